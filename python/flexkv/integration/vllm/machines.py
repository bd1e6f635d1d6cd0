"""An engine whose ranks are on several machines (`--nnodes`): each rank uses the node of its own machine, which keeps
the blocks of the ranks there, and the scheduler asks all of them. docs/operations/several_machines.md."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexkv.config import ConfigError, Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Machines:
    """Of one engine (of a data-parallel one: of one of its schedulers). The scheduler is on the first."""

    count: int
    this: int
    ranks: int  # on each of them

    @property
    def first_rank(self) -> int:
        """On this machine. Their nodes know the ranks of theirs by the numbers from 0 on."""
        return self.this * self.ranks

    def fingerprint(self, machine: int, of_engine: bytes) -> bytes:
        """Of the part of each block that this machine keeps: no other part, nor that of an engine that is divided
        otherwise, is taken for it."""
        if self.count == 1:
            return of_engine
        part = f"machine {machine} of {self.count}, {self.ranks} ranks each"
        return hashlib.sha256(of_engine + part.encode()).digest()


def machines_of(config: VllmConfig) -> Machines:
    parallel = config.parallel_config
    count = int(getattr(parallel, "nnodes_within_dp", 1))
    this = int(getattr(parallel, "node_rank_within_dp", 0)) if count > 1 else 0
    return Machines(count, this, int(parallel.world_size) // count)


def why_not(config: VllmConfig, settings: Settings) -> str | None:
    """Why FlexKV cannot serve this engine as it is divided; None: it can. Raises ConfigError where the settings name
    another number of machines."""
    machines = machines_of(config)
    if machines.count == 1:
        return None
    if settings.node_target.mode != "daemon":
        return (
            f"this engine is on {machines.count} machines, and each needs a node of its own: start `flexkv serve` on every "
            "one and name it with `node` (FLEXKV_NODE); an engine's own node serves its machine only"
        )
    if machines.this > 0:
        return None
    others = machines.count - 1
    if not settings.engine_hosts:
        return (
            f"this engine is on {machines.count} machines: name the nodes of the {others} others in engine_hosts "
            "(FLEXKV_ENGINE_HOSTS=HOST:PORT,...), in the order of their ranks"
        )
    if len(settings.engine_hosts) != others:
        raise ConfigError(
            [
                f"engine_hosts: {len(settings.engine_hosts)} from {settings.origin('engine_hosts')}; the engine is on "
                f"{machines.count} machines, so {others} besides the scheduler's: one HOST:PORT for each, in the order of "
                "their ranks"
            ]
        )
    return None
