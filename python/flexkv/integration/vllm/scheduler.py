"""The scheduler side: looks prompts up, orders loads and, by `save_orders`, saves. Lives in vLLM's EngineCore thread,
where every microsecond delays decoding, so per step it touches only requests that did something.

A request has one chain of blocks for each KV cache group (`groups`); most models have one group.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flexkv.config import Settings
from flexkv.integration.vllm import compat, events
from flexkv.integration.vllm.clients import open_clients
from flexkv.integration.vllm.groups import Group, alignment_tokens
from flexkv.integration.vllm.metadata import FlexKVMetadata, LoadOrder
from flexkv.integration.vllm.save_orders import SaveOrders
from flexkv.integration.vllm.states import longest_with_states
from flexkv.integration.vllm.step_times import StepTimes
from flexkv.integration.vllm.tracked import Chain, Tracked

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("flexkv.vllm")


class SchedulerSide:
    def __init__(self, config: VllmConfig, settings: Settings, groups: list[Group]) -> None:
        self._groups = groups
        self._alignment = alignment_tokens(groups)
        self._at_boundaries = [number for number, group in enumerate(groups) if group.at_boundaries]
        self._settings = settings
        self._requests: dict[str, Tracked] = {}
        self._loads: list[LoadOrder] = []
        self._step = 0
        # With several groups vLLM takes failures only by request, and so only of parked ones. With windows only it has to:
        # what the window of the first block that failed needs was not loaded.
        by_request = len(groups) > 1 or groups[0].window is not None
        sync_blocks = settings.sync_load_max_bytes // max(_block_bytes_estimate(config, groups[0]), 1)
        self._sync_tokens_max = 0 if by_request else sync_blocks * groups[0].block_tokens
        # When a load within a step fails, vLLM (0.32) takes the request's token count back, but not the tokens that
        # asynchronous scheduling has in flight: a wrong token, or an index error that ends the engine. Parked ones recover.
        if getattr(getattr(config, "scheduler_config", None), "async_scheduling", False):
            self._sync_tokens_max = 0
        self._speculates = getattr(config, "speculative_config", None) is not None
        self._sleeps_after_reset = compat.sleep_follows_reset(config)
        self._steps = StepTimes()
        self._prefetches = settings.reaches_beyond_memory
        self._trace = logger.isEnabledFor(logging.DEBUG)
        self._events = events.wanted(config, settings)
        self._engine_clears = False  # vLLM has told routers so, or is about to
        self._clients, self._node, self._metrics = open_clients(config, settings, groups)
        self.take_events()  # nodes remember what blocks are called from the first time on
        self._saves = SaveOrders(
            groups, self._clients, self._requests, settings.save_timeout_ms / 1000, describes=self._events
        )

    # ---- lookup and load

    def on_new_request(self, request: Request) -> None:
        """While the request waits for its turn, its blocks come from drives and other nodes to host memory."""
        if self._prefetches:
            tracked = self._track(request)
            for group, client, chain in self._with_chains(tracked):
                client.prefetch(chain.sequence, group.hashes(tracked.block_hashes()))

    def _track(self, request: Request) -> Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            options = (request.kv_transfer_params or {}).get("flexkv") or {}
            chains = [
                Chain(client.open_sequence(), client.open_sequence() if group.tail_blocks else 0)
                for group, client in zip(self._groups, self._clients, strict=True)
            ]
            save = bool(options.get("save", True))
            # A session that goes on after a stop in the midst of accepted drafts: vLLM (0.32) takes the KV of those behind
            # the stop for that of the next input.
            if self._speculates and getattr(request, "resumable", False):
                save = False
            tracked = Tracked(request, chains, save)
            self._requests[request.request_id] = tracked
        return tracked

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        tracked = self._track(request)
        tracked.request = request
        on_drives = False
        # The last token is always computed: its logits are what the engine is asked for.
        served = request.num_tokens - 1
        block_hashes = tracked.block_hashes()
        for group, client, chain in self._with_chains(tracked):
            hashes = group.hashes(block_hashes)
            in_engine = num_computed_tokens // group.block_tokens
            matched, reason, disk_blocks = client.lookup(chain.sequence, hashes, in_engine)
            on_drives = on_drives or disk_blocks > 0
            if self._trace:
                logger.debug(
                    "FlexKV: request %s, group %d, sequence %d: %d of %d blocks to load (%d from drives), "
                    "%d tokens in the engine; the next one is not: %s",
                    request.request_id,
                    group.index,
                    chain.sequence,
                    matched,
                    len(hashes),
                    disk_blocks,
                    num_computed_tokens,
                    reason,
                )
            if self._events:
                events.describe_found(client, group, chain, request, matched)
            chain.offers.restart(matched)
            served = min(served, matched * group.block_tokens)
        tracked.local_tokens = num_computed_tokens
        tracked.outdated = tracked.tainted = False
        served = served // self._alignment * self._alignment
        for number in self._at_boundaries:
            tracked.chains[number].offers.restart(0)
        if self._at_boundaries and served > num_computed_tokens:
            parts = [(self._groups[i], self._clients[i], tracked.chains[i]) for i in self._at_boundaries]
            begin = num_computed_tokens
            limit = tracked.boundary_limit(begin, served)
            kept, states_on_drives = longest_with_states(parts, block_hashes, begin, limit, self._alignment)
            tracked.remember_boundary(begin, served, kept)
            if self._trace and kept < served:
                logger.debug(
                    "FlexKV: request %s: attention has %d tokens, states or windows there are after %d",
                    *(request.request_id, served, kept),
                )
            served, on_drives = kept, on_drives or states_on_drives
        wanted = served - num_computed_tokens
        # Asked again after a load, and not preempted since: the load has failed. Trying once more could fail once more, and
        # a request that waits for its blocks at the head of the queue would keep those behind it from giving theirs back.
        failed = tracked.loaded_in_life == request.num_preemptions
        # Who wants the log-probabilities of its prompt needs all of it computed; vLLM heeds that itself only from 0.31 on.
        all_computed = getattr(request, "skip_reading_prefix_cache", False)
        if failed or all_computed or wanted < max(self._settings.min_load_tokens, 1):
            return 0, False
        tracked.load_async = on_drives or wanted > self._load_within_step_max()
        return wanted, tracked.load_async

    def _with_chains(self, tracked: Tracked) -> Iterator[tuple[Group, Any, Chain]]:
        """The groups that keep a prompt's blocks from the first one on."""
        for group, client, chain in zip(self._groups, self._clients, tracked.chains, strict=True):
            if not group.at_boundaries:
                yield group, client, chain

    def _load_within_step_max(self) -> int:
        """Tokens. The engine's other requests should wait neither for drives nor for long loads; where there are none, the
        forward begins with what has arrived, while the rest is on its way."""
        if len(self._requests) == 1 and self._sync_tokens_max > 0:
            return sys.maxsize
        return self._sync_tokens_max

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        tables = blocks.get_block_ids()
        for group, chain in zip(self._groups, tracked.chains, strict=True):
            chain.block_ids = list(tables[group.index])
            # All but those of the engine's own cache are going to be overwritten: by the engine, by us, or, from this step
            # on and without our being told, by another connector under vLLM's MultiConnector.
            self._saves.filled(chain.block_ids[tracked.local_tokens // group.block_tokens :])
        tracked.parked = num_external_tokens > 0 and tracked.load_async
        # Without tokens: nothing to load, or a parked request that is admitted after its load.
        if num_external_tokens <= 0:
            return
        parts = []
        lacking = False  # no room for a state, or for a window
        for group, client, chain in zip(self._groups, self._clients, tracked.chains, strict=True):
            first = tracked.local_tokens // group.block_tokens
            end = (tracked.local_tokens + num_external_tokens) // group.block_tokens
            runs = group.to_load(chain.block_ids, first, end)
            lacking = lacking or (group.at_boundaries and not runs)
            parts += [(group, client, chain, position, block_ids) for position, block_ids in runs]
        # Listed before it is ordered: whatever goes wrong from here, the workers report on it and nobody waits for ever.
        block_ids = parts[0][-1] if len(parts) == 1 else list(itertools.chain.from_iterable(part[-1] for part in parts))
        order = LoadOrder(request.request_id, not tracked.load_async, block_ids)
        self._loads.append(order)
        tracked.loaded_in_life = request.num_preemptions
        for group, client, chain, position, block_ids in parts:
            order.jobs.append((group.index, client.load(chain.sequence, position, block_ids)))
        order.complete = bool(order.jobs) and not lacking

    # ---- one step

    def build_connector_meta(self, output: SchedulerOutput) -> FlexKVMetadata:
        self._step += 1
        meta = FlexKVMetadata(step=self._step)
        meta.loads, self._loads = self._loads, []
        try:
            self._steps.begin(output)
            self._saves.order(output, meta)
        except Exception:
            # The loads are promised to the engine and must reach the workers, whatever happens to the saves. These are
            # all given up: which of them the step would overwrite is not known.
            logger.exception("FlexKV: ordering saves failed; the engine goes on without them")
            meta.saves = []
            self._saves.call_off_all()
        return meta

    # ---- the rest of a request's life

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        if (step := self._steps.end()) is not None:
            for client in self._clients:
                client.observe_step(*step)
        if not output.invalid_block_ids and not getattr(output, "failed_recving", None):
            return
        # Blocks that were counted as kept are not, and saves of the last steps were withheld.
        self._saves.offer_again()
        if output.invalid_block_ids:
            self._saves.taint(output.invalid_block_ids)

    def request_finished(self, request: Request) -> None:
        tracked = self._requests.pop(request.request_id, None)
        if not self._requests:
            self._steps.clear()
        for client, chain in zip(self._clients, tracked.chains if tracked is not None else (), strict=False):
            client.close_sequence(chain.sequence)
            if chain.heads:
                client.close_sequence(chain.heads)

    def take_events(self) -> list[KVCacheEvent]:
        cleared, self._engine_clears = self._engine_clears, False
        return events.take(self._clients, cleared) if self._events else []

    def before_engine_events(self, pool: Any) -> None:
        """The engine is about to take its own events from its block pool."""
        self._engine_clears = self._engine_clears or (self._events and events.engine_clears(pool))

    def reset_cache(self) -> bool:
        """What is kept, and what requests have computed so far, is not to be found any more. vLLM also says so before it
        puts its memory to sleep, and where its workers are not told of that, nothing of ours reads it on return. False:
        something still does."""
        for client in self._clients:
            client.reset()
        for tracked in self._requests.values():
            tracked.outdated = True
        return self._saves.end_all() if self._sleeps_after_reset else True

    def shutdown(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        for client in self._clients:
            client.close()
        if self._node is not None:
            self._node.stop()
            self._node = None


def _block_bytes_estimate(config: VllmConfig, group: Group) -> int:
    """Bytes of one block on one rank, as far as the configuration tells: only decides between two ways to load."""
    try:
        model = config.model_config
        parallel = config.parallel_config
        heads = model.get_num_kv_heads(parallel)
        layers = model.get_num_layers(parallel)
        element = 1 if "fp8" in str(config.cache_config.cache_dtype) else model.dtype.itemsize
        return group.block_tokens * layers * 2 * heads * model.get_head_size() * element
    except Exception:
        return 1 << 20
