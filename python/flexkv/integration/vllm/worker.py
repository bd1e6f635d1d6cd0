"""The worker side: registers the KV memory with a rank agent, lets transfers run at the right moment, reports loads.

vLLM calls everything here from the worker's main thread.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from flexkv import _core
from flexkv.config import Settings
from flexkv.integration.vllm import identity
from flexkv.integration.vllm.groups import Group
from flexkv.integration.vllm.machines import machines_of
from flexkv.integration.vllm.metadata import FlexKVMetadata, Job, LoadOrder, by_group
from flexkv.integration.vllm.shards import first_alike
from flexkv.integration.vllm.stats import COUNTS, FlexKVStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("flexkv.vllm")

# After a failed load within a step nothing is saved until every step that was scheduled without knowing of it has passed:
# what they compute may rest on blocks that were never filled. vLLM has at most pipeline stages + 1 steps in flight. A
# request that is parked computes nothing before the scheduler knows.
_DISTRUST_STEPS = 16


class _Load:
    """An order on its way: ends when all its jobs have, as they write to the same request's blocks."""

    __slots__ = ("good_blocks", "keeps_beginning", "order", "running")

    def __init__(self, order: LoadOrder, keeps_beginning: bool) -> None:
        """`keeps_beginning`: what was loaded before the first block that was not may be used. Else it is all or nothing."""
        self.order = order
        self.keeps_beginning = keeps_beginning and len(order.jobs) == 1
        self.good_blocks = len(order.block_ids) if order.complete else 0
        self.running = len(order.jobs)

    def job_ended(self, ok: bool, good_blocks: int) -> None:
        if not ok:
            self.good_blocks = min(self.good_blocks, good_blocks) if self.keeps_beginning else 0
        self.running -= 1


class _FollowedLoads:
    """The loads within the current step, which its forward follows part by part."""

    def __init__(self, parts: dict[str, int] | None = None) -> None:
        """`parts`: after how many parts of a load each layer is filled."""
        self._parts = parts or {}
        self.all_parts = max(self._parts.values(), default=0)
        self.jobs: list[int] = []
        self.step = -1
        self.reached = -1  # parts that the engine's stream has been told to wait for; below 0: they were not begun

    def expect(self, jobs: list[int], step: int) -> None:
        self.jobs = jobs
        self.step = step
        self.reached = -1

    def begin(self, agent: Any) -> None:
        agent.arm_loads_in_parts(self.jobs, _engine_stream())
        self.reached = 0

    def parts_of(self, layer_name: str) -> int:
        return self._parts.get(layer_name, self.all_parts)

    def reach(self, agent: Any, parts: int) -> None:
        if 0 <= self.reached < parts:
            agent.hold_engine(self.jobs, parts, _engine_stream())
            self.reached = parts


class WorkerSide:
    def __init__(self, config: VllmConfig, settings: Settings, groups: list[Group], block_count: int | None) -> None:
        """`block_count`: of the engine's pool, as far as it tells."""
        self._config = config
        self._settings = settings
        self._groups = groups
        self._block_count = block_count
        self._kv_caches: dict[str, torch.Tensor] = {}  # as registered; they stay while their memory goes and comes back
        self._agents: list[Any] = []  # one for each group once registered
        self._distrust_until = -1
        self._distrust_steps = _DISTRUST_STEPS + config.parallel_config.pipeline_parallel_size
        self._loading: dict[Job, _Load] = {}
        self._ended: list[tuple[LoadOrder, int]] = []
        self._bad_blocks: set[int] = set()
        self._reported: dict[str, Any] = {}
        self._step = -1
        self._followed = _FollowedLoads()
        self._layers_can_follow = True

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.unregister_kv_caches()
        self._kv_caches = kv_caches
        config = self._config
        target = self._settings.node_target
        embedded = target.mode == "embedded"
        rank = identity.worker_rank(config)
        machines = machines_of(config)
        options = {
            "runtime_dir": target.runtime_dir,
            "node_name": identity.embedded_node_name(config) if embedded else target.name,
            "rank": rank - machines.first_rank,
            "rank_count": machines.ranks,
            "load_timeout_ms": self._settings.load_timeout_ms,
            "save_timeout_ms": self._settings.save_timeout_ms,
            "gpu_stage_below_bytes": self._settings.gpu_stage_below_bytes,
            "log_level": self._settings.log_level,
        }
        pool_blocks = self._block_count or config.cache_config.num_gpu_blocks
        agents = []
        for group in self._groups:
            layers = group.layers_of(kv_caches)
            tensors, block_count, device = _describe(layers, pool_blocks)
            shard = first_alike(config, machines.first_rank, rank, layers)
            of_group = {"engine_id": group.engine_id(identity.engine_id(config)), "shard": shard - machines.first_rank}
            agents.append(_core.RankAgent(options | of_group, tensors, block_count, device))
            for line in agents[-1].layout().splitlines():
                logger.info("FlexKV: KV memory on %s, %d blocks: %s", device, block_count, line)
            if shard != rank:
                logger.info("FlexKV: rank %d holds the same KV as rank %d: it is stored once", rank, shard)
        self._agents = agents
        # Loads within a step are for models of one group only (SchedulerSide).
        self._followed = _FollowedLoads(dict(zip(self._groups[0].layers_of(kv_caches), agents[0].parts(), strict=True)))

    def unregister_kv_caches(self) -> None:
        """On return nothing of ours touches device memory, until it is registered again. What was under way has failed;
        what the engine orders meanwhile does at once."""
        for agent in self._agents:
            agent.stop()
        self._agents = []
        self._reported = {}
        self._followed = _FollowedLoads()
        loads = set(self._loading.values())
        self._loading.clear()
        for load in loads:
            self._end(load.order, 0, self._step)

    def restore_kv_caches(self) -> None:
        """The same tensors have memory again, maybe elsewhere."""
        if not self._agents and self._kv_caches:
            self.register_kv_caches(self._kv_caches)

    # ---- one step

    def start_loads(self, meta: FlexKVMetadata, layers_will_ask: bool) -> None:
        """`layers_will_ask`: each layer of this step's forward is going to call before_layer()."""
        self._step = meta.step
        # With several groups vLLM takes a load as a whole. What windows need of a shorter prompt lies before what was loaded.
        keeps_beginning = len(self._groups) == 1 and self._groups[0].window is None
        loads = [_Load(order, keeps_beginning) for order in meta.loads]
        if not self._agents:
            for load in loads:
                self._end(load.order, 0, meta.step)
            return
        for load in loads:
            self._loading.update(dict.fromkeys(load.order.jobs, load))
            if load.running == 0:  # nothing could be ordered
                self._end(load.order, 0, meta.step)
        # What the forward needs has failed if anything goes wrong before it is begun.
        within = [job for load in loads if load.order.sync for _, job in load.order.jobs]
        if within:
            self._followed.expect(within, meta.step)
        beside = by_group([job for load in loads if not load.order.sync for job in load.order.jobs])
        for group, jobs in beside.items():
            self._agents[group].arm_loads(jobs, _engine_stream())
        if within:
            self._followed.begin(self._agents[0])
            if not (layers_will_ask and self._layers_can_follow):
                self._followed.reach(self._agents[0], self._followed.all_parts)

    def before_layer(self, layer_name: str) -> None:
        """The engine's stream goes on when the loads of this step have filled the layer. No thread waits for it, except
        on CPUs, where the stream is the thread."""
        if self._followed.jobs:
            self._followed.reach(self._agents[0], self._followed.parts_of(layer_name))

    def _end_followed(self) -> None:
        """Waits for the loads within the step, and learns how they ended. The forward is on its way or over."""
        followed = self._followed
        if not followed.jobs:
            return
        jobs, followed.jobs = followed.jobs, []
        failed = dict(self._agents[0].wait_loads(jobs))
        if followed.reached < followed.all_parts:
            failed = dict.fromkeys(jobs, 0)
            if followed.reached >= 0:
                self._layers_can_follow = False
                logger.warning("FlexKV: not all layers of this model wait for their loads: the forward will wait for them")
        for job in jobs:
            self._job_ended((0, job), job not in failed, failed.get(job, 0), followed.step)

    def start_saves(self, meta: FlexKVMetadata) -> None:
        self._end_followed()  # what a failed one leaves must not be saved
        if not self._agents or not meta.saves:
            return
        for group, jobs in by_group(meta.saves).items():
            if meta.step <= self._distrust_until:
                self._agents[group].cancel(jobs)
            else:
                self._agents[group].arm_saves(jobs, _engine_stream())

    def take_ended_loads(self, step: int) -> list[tuple[LoadOrder, int]]:
        """Loads of parked requests that have ended on this rank since the last call, and how many of their blocks, from the
        first one on, are there."""
        self._end_followed()
        for group, agent in enumerate(self._agents):
            for job, ok, good_blocks in agent.take_loads():
                self._job_ended((group, job), ok, good_blocks, step)
        ended, self._ended = self._ended, []
        return ended

    def _job_ended(self, job: Job, ok: bool, good_blocks: int, step: int) -> None:
        load = self._loading.pop(job, None)
        if load is None:
            return
        load.job_ended(ok, good_blocks)
        if load.running == 0:
            self._end(load.order, load.good_blocks, step)

    def take_bad_blocks(self) -> set[int]:
        """Device blocks that a load of this step should have filled and did not."""
        self._end_followed()
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def stats(self) -> FlexKVStats | None:
        if not self._agents:
            return None
        of_agents = [agent.counters() for agent in self._agents]
        counters = {name: sum(counters[name] for counters in of_agents) for name in COUNTS}
        stats = FlexKVStats.since(counters, self._reported)
        self._reported = counters
        return None if stats.is_empty() else stats

    def _end(self, order: LoadOrder, good_blocks: int, step: int) -> None:
        bad_blocks = order.block_ids[good_blocks:]
        if bad_blocks or not order.complete:
            logger.warning(
                "FlexKV: %d of %d blocks of request %s could not be loaded, and are computed",
                *(len(bad_blocks), len(order.block_ids), order.request_id),
            )
        if not order.sync:
            self._ended.append((order, good_blocks))
        elif bad_blocks:
            self._distrust_until = step + self._distrust_steps
            self._bad_blocks.update(bad_blocks)

    def shutdown(self) -> None:
        self.unregister_kv_caches()
        self._kv_caches = {}


def _engine_stream() -> int:
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_initialized() else 0


def _describe(kv_caches: dict[str, torch.Tensor], pool_blocks: int | None) -> tuple[list[dict[str, Any]], int, str]:
    """The tensors as addresses, shapes and strides; how many blocks they hold; where they are."""
    if not kv_caches:
        raise ValueError("the engine registered no KV tensors")
    tensors: list[dict[str, Any]] = []
    block_count = 0
    device = ""
    for name, tensor in kv_caches.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"KV cache {name!r} is a {type(tensor).__name__}: models with state caches need the full connector"
            )
        where = "host" if tensor.device.type == "cpu" else f"{tensor.device.type}:{tensor.device.index or 0}"
        if device and where != device:
            raise ValueError(f"KV cache {name!r} is on {where}, others on {device}")
        device = where
        shape = list(tensor.shape)
        # Before 0.32 some backends stack K and V in front of the blocks: [2, blocks, tokens, heads, size].
        axis = 1 if len(shape) == 5 and shape[0] == 2 else 0
        blocks = shape[axis]
        ratio = blocks // pool_blocks if pool_blocks and blocks % pool_blocks == 0 else 1
        if block_count and blocks // ratio != block_count:
            raise ValueError(f"KV cache {name!r} holds {blocks // ratio} blocks, others {block_count}")
        block_count = blocks // ratio
        tensors.append(
            {
                "name": name,
                "address": tensor.data_ptr(),
                "element_bytes": tensor.element_size(),
                "shape": shape,
                "stride": list(tensor.stride()),
                "block_axis": axis,
                "kernel_blocks_per_block": ratio,
            }
        )
    return tensors, block_count, device
