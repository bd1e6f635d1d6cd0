"""The scheduler side: looks prompts up, orders loads and saves. Lives in vLLM's EngineCore thread, where every
microsecond delays decoding, so per step it touches only requests that did something.

Blocks are saved in the step that completes them. A request's device blocks may be reused as soon as vLLM frees them, so
saves still running are remembered by block (`saves`), and a step that is going to overwrite such a block is told to
wait for them.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from flexkv import _core
from flexkv.config import Settings
from flexkv.integration.vllm import identity
from flexkv.integration.vllm.metadata import FlexKVMetadata, LoadOrder
from flexkv.integration.vllm.saves import Offers, RunningSaves, Save
from flexkv.metrics import start_metrics

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("flexkv.vllm")


class _Tracked:
    """A request as far as the cache is concerned. Block numbers count from the start of the prompt."""

    __slots__ = (
        "block_ids",
        "load_async",
        "loaded_in_life",
        "local_blocks",
        "offers",
        "outdated",
        "request",
        "save",
        "sequence",
    )

    def __init__(self, request: Request, sequence: int, save: bool) -> None:
        self.request = request
        self.sequence = sequence
        self.block_ids: list[int] = []
        self.local_blocks = 0  # in the engine's own cache at the last lookup
        self.loaded_in_life = -1  # number of preemptions when a load was last ordered
        self.offers = Offers()
        self.outdated = False  # its blocks were computed before a reset
        self.load_async = False  # what the engine was told at the last lookup
        self.save = save


class SchedulerSide:
    def __init__(self, config: VllmConfig, settings: Settings) -> None:
        self._block_size = _block_tokens(config)
        self._settings = settings
        self._node = None
        self._requests: dict[str, _Tracked] = {}
        self._loads: list[LoadOrder] = []
        self._saves = RunningSaves()
        self._generation = 0  # of the client's connection, at the last step
        self._step = 0
        self._sync_blocks_max = settings.sync_load_max_bytes // max(_block_bytes_estimate(config), 1)
        self._metrics: Any = None
        self._trace = logger.isEnabledFor(logging.DEBUG)
        self.client = self._open_client(config)

    def _open_client(self, config: VllmConfig) -> Any:
        target = self._settings.node_target
        name = identity.model_name(config)
        digest = identity.fingerprint(config, self._settings.namespace)
        who = (identity.engine_id(config), identity.rank_count(config), name, digest)
        if target.mode != "daemon":
            node_name = identity.embedded_node_name(config) if target.mode == "embedded" else target.name
            node = _core.Node({**self._settings.node_options(), "mode": target.mode})
            try:
                node.listen(target.runtime_dir, node_name)
            except RuntimeError:
                if target.mode == "embedded":
                    raise
            else:
                self._node = node
                logger.info("FlexKV: %s", node.describe())
                if self._settings.enable_metrics:
                    self._metrics = start_metrics(self._settings.metrics_port, lambda: json.loads(node.status()))
                return _core.Client.embedded(node, *who)
        return _core.Client.remote(target.runtime_dir, target.name, *who)

    # ---- lookup and load

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            options = (request.kv_transfer_params or {}).get("flexkv") or {}
            tracked = _Tracked(request, self.client.open_sequence(), bool(options.get("save", True)))
            self._requests[request.request_id] = tracked
        size = self._block_size
        matched, reason = self.client.lookup(tracked.sequence, request.block_hashes)
        if self._trace:
            logger.debug(
                "FlexKV: request %s: %d of %d blocks kept, %d of them in the engine; the next one is not: %s",
                request.request_id,
                matched,
                len(request.block_hashes),
                num_computed_tokens // size,
                reason,
            )
        tracked.request = request
        tracked.local_blocks = num_computed_tokens // size
        tracked.offers.offered = matched
        tracked.outdated = False
        # The last token is always computed: its logits are what the engine is asked for.
        wanted = min(matched, (request.num_tokens - 1) // size) - tracked.local_blocks
        # Asked again after a load, and not preempted since: the load has failed. Trying once more could fail once more, and
        # a request that waits for its blocks at the head of the queue would keep those behind it from giving theirs back.
        failed = tracked.loaded_in_life == request.num_preemptions
        if failed or wanted * size < max(self._settings.min_load_tokens, 1):
            return 0, False
        tracked.load_async = wanted > self._sync_blocks_max
        return wanted * size, tracked.load_async

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        tracked.block_ids = list(blocks.get_block_ids()[0])
        # Without tokens: nothing to load, or a parked request that is admitted after its load.
        if num_external_tokens <= 0:
            return
        first = tracked.local_blocks
        count = num_external_tokens // self._block_size
        block_ids = tracked.block_ids[first : first + count]
        # Listed before it is ordered: whatever goes wrong from here, the workers report on it and nobody waits for ever.
        order = LoadOrder(0, request.request_id, not tracked.load_async, block_ids)
        self._loads.append(order)
        tracked.loaded_in_life = request.num_preemptions
        order.job = self.client.load(tracked.sequence, first, block_ids)

    # ---- save

    def build_connector_meta(self, output: SchedulerOutput) -> FlexKVMetadata:
        self._step += 1
        meta = FlexKVMetadata(step=self._step)
        meta.loads, self._loads = self._loads, []
        try:
            self._order_saves(output, meta)
        except Exception:
            # The loads are promised to the engine and must reach the workers, whatever happens to the saves.
            logger.exception("FlexKV: ordering saves failed; the engine goes on without them")
        return meta

    def _order_saves(self, output: SchedulerOutput, meta: FlexKVMetadata) -> None:
        fences: set[int] = set()
        self._settle_saves(fences)
        for load in meta.loads:
            self._saves.add_readers(load.block_ids, fences)
        for new in output.scheduled_new_reqs:
            self._advance(new.req_id, new.num_computed_tokens, new.block_ids[0], True, output, meta, fences)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            added = cached.new_block_ids[i]
            resumed = request_id in cached.resumed_req_ids
            block_ids = added[0] if added else []
            self._advance(request_id, cached.num_computed_tokens[i], block_ids, resumed, output, meta, fences)
        meta.fences = list(fences)

    def _advance(
        self,
        request_id: str,
        computed: int,
        block_ids: list[int],
        whole_table: bool,
        output: SchedulerOutput,
        meta: FlexKVMetadata,
        fences: set[int],
    ) -> None:
        tracked = self._requests.get(request_id)
        if tracked is None:
            return
        if whole_table:
            tracked.block_ids = list(block_ids)
            self._saves.add_readers(block_ids[computed // self._block_size :], fences)
        elif block_ids:
            tracked.block_ids.extend(block_ids)
            self._saves.add_readers(block_ids, fences)
        if not tracked.save or tracked.outdated:
            return
        # Only tokens that are certain have hashes: drafts that may yet be rejected, and tokens still being sampled by
        # a step in flight, are saved later.
        after_step = (computed + output.num_scheduled_tokens.get(request_id, 0)) // self._block_size
        full = min(after_step, len(tracked.request.block_hashes), len(tracked.block_ids))
        first = tracked.offers.offered
        if full <= first or not tracked.offers.due(self._step):
            return
        blocks = tracked.block_ids[first:full]
        job = self.client.save(tracked.sequence, tracked.request.block_hashes, first, blocks)
        if job == 0:  # no node, or its ranks are not there yet
            tracked.offers.refused(first, self._step)
            return
        tracked.offers.offered = full
        meta.saves.append(job)
        self._saves.add(job, Save(tracked.offers, first, blocks))

    def _settle_saves(self, fences: set[int]) -> None:
        """Forgets the saves that have ended; what was not kept is offered again later."""
        for job, problem in self.client.take_ended_jobs():
            if (save := self._saves.end(job)) is None:
                continue
            if problem:
                save.offers.refused(save.first, self._step, from_start=problem != "pool_full")
            else:
                save.offers.kept()
        generation = self.client.generation()
        if generation != self._generation:
            # Nobody will tell how earlier saves ended: the workers end them, before anything is overwritten. And what
            # was kept may be gone.
            self._generation = generation
            fences.update(self._saves.abandon())
            self._offer_again()

    def _offer_again(self) -> None:
        for tracked in self._requests.values():
            tracked.offers.offered = 0

    # ---- the rest of a request's life

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        if not output.invalid_block_ids and not getattr(output, "failed_recving", None):
            return
        # Blocks that were counted as kept are not, and saves of the last steps were withheld.
        self._offer_again()

    def request_finished(self, request: Request) -> None:
        tracked = self._requests.pop(request.request_id, None)
        if tracked is not None:
            self.client.close_sequence(tracked.sequence)

    def reset_cache(self) -> None:
        """What is kept, and what requests have computed so far, is not to be found any more."""
        self.client.reset()
        for tracked in self._requests.values():
            tracked.outdated = True

    def shutdown(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self.client.close()
        if self._node is not None:
            self._node.stop()
            self._node = None


def _block_tokens(config: VllmConfig) -> int:
    parallel = config.parallel_config
    context = getattr(parallel, "decode_context_parallel_size", 1) * getattr(
        parallel, "prefill_context_parallel_size", 1
    )
    return int(config.cache_config.block_size) * context


def _block_bytes_estimate(config: VllmConfig) -> int:
    """Bytes of one block on one rank, as far as the configuration tells: only decides between two ways to load."""
    try:
        model = config.model_config
        parallel = config.parallel_config
        heads = model.get_num_kv_heads(parallel)
        layers = model.get_num_layers(parallel)
        element = 1 if "fp8" in str(config.cache_config.cache_dtype) else model.dtype.itemsize
        return _block_tokens(config) * layers * 2 * heads * model.get_head_size() * element
    except Exception:
        return 1 << 20
