"""What the scheduler side tells the worker side, once per step. Job ids only: blocks travel through the node."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from flexkv.integration.common.saves import Job


@dataclass(slots=True)
class LoadOrder:
    request_id: str
    # The step's forward needs it (the request runs in this step); otherwise the request is parked until it is reported.
    sync: bool
    # Device blocks to be filled, in the order of the jobs, to name those that were not when the load fails.
    block_ids: list[int]
    jobs: list[Job] = field(default_factory=list)
    # False: something went wrong before all jobs were ordered. The load fails, but not before those that were have ended.
    complete: bool = False


@dataclass(slots=True)
class FlexKVMetadata(KVConnectorMetadata):
    step: int = 0
    loads: list[LoadOrder] = field(default_factory=list)
    # Saves whose blocks are complete after this step's forward.
    saves: list[Job] = field(default_factory=list)


def by_group(jobs: list[Job]) -> dict[int, list[int]]:
    ids: dict[int, list[int]] = {}
    for group, job in jobs:
        ids.setdefault(group, []).append(job)
    return ids
