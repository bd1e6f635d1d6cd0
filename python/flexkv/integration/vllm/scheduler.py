"""The scheduler side: looks prompts up, orders loads and saves. Lives in vLLM's EngineCore thread, where every
microsecond delays decoding, so per step it touches only requests that did something.

A request has one chain of blocks for each KV cache group (`groups`); most models have one group.

Blocks are saved in the step that completes them. A request's device blocks may be reused as soon as vLLM frees them, so
saves still running are remembered by block (`saves`), and before a step goes out that is going to overwrite such a
block, the node is told to keep nothing of them (docs/decisions/0010).
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from flexkv.config import Settings
from flexkv.integration.vllm import compat
from flexkv.integration.vllm.clients import open_clients
from flexkv.integration.vllm.groups import Group, alignment_tokens
from flexkv.integration.vllm.metadata import FlexKVMetadata, Job, LoadOrder
from flexkv.integration.vllm.saves import RunningSaves, Save
from flexkv.integration.vllm.step_times import StepTimes
from flexkv.integration.vllm.tracked import Chain, Tracked

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("flexkv.vllm")

# Ranks whose node is gone end their copies by themselves, and nobody tells when: in milliseconds.
_QUIET_SECONDS = 1.0


class SchedulerSide:
    def __init__(self, config: VllmConfig, settings: Settings, groups: list[Group]) -> None:
        self._groups = groups
        self._alignment = alignment_tokens(groups)
        self._settings = settings
        self._requests: dict[str, Tracked] = {}
        self._loads: list[LoadOrder] = []
        self._filled: list[list[int]] = []  # device blocks of requests that were admitted since the last step
        self._saves = RunningSaves()
        self._quiet_at = 0.0  # from when on saves of nodes that are gone read nothing
        # Device blocks that failed loads left, and what was computed from them: see _taint(). Until they are overwritten.
        self._tainted: set[int] = set()
        self._generations = [0] * len(groups)  # of the clients' connections, at the last step
        self._step = 0
        # With several groups vLLM takes failures only by request, and so only of parked ones.
        sync_blocks = settings.sync_load_max_bytes // max(_block_bytes_estimate(config, groups[0]), 1)
        self._sync_tokens_max = sync_blocks * groups[0].block_tokens if len(groups) == 1 else 0
        # When a load within a step fails, vLLM (0.32) takes the request's token count back, but not the tokens that
        # asynchronous scheduling has in flight: a wrong token, or an index error that ends the engine. Parked ones recover.
        if getattr(getattr(config, "scheduler_config", None), "async_scheduling", False):
            self._sync_tokens_max = 0
        self._sleeps_after_reset = compat.sleep_follows_reset(config)
        self._steps = StepTimes()
        self._may_have_drives = settings.node_target.mode != "embedded" or settings.ssd_cache_bytes > 0
        self._trace = logger.isEnabledFor(logging.DEBUG)
        self._clients, self._node, self._metrics = open_clients(config, settings, groups)

    # ---- lookup and load

    def on_new_request(self, request: Request) -> None:
        """While the request waits for its turn, its blocks come from drives to host memory."""
        if self._may_have_drives:
            tracked = self._track(request)
            for group, client, chain in zip(self._groups, self._clients, tracked.chains, strict=True):
                client.prefetch(chain.sequence, group.hashes(tracked.block_hashes()))

    def _track(self, request: Request) -> Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            options = (request.kv_transfer_params or {}).get("flexkv") or {}
            chains = [Chain(client.open_sequence()) for client in self._clients]
            tracked = Tracked(request, chains, bool(options.get("save", True)))
            self._requests[request.request_id] = tracked
        return tracked

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        tracked = self._track(request)
        tracked.request = request
        on_drives = False
        # The last token is always computed: its logits are what the engine is asked for.
        served = request.num_tokens - 1
        block_hashes = tracked.block_hashes()
        for group, client, chain in zip(self._groups, self._clients, tracked.chains, strict=True):
            hashes = group.hashes(block_hashes)
            matched, reason, disk_blocks = client.lookup(chain.sequence, hashes)
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
            chain.offers.restart(matched)
            served = min(served, matched * group.block_tokens)
        tracked.local_tokens = num_computed_tokens
        tracked.outdated = tracked.tainted = False
        wanted = served // self._alignment * self._alignment - num_computed_tokens
        # Asked again after a load, and not preempted since: the load has failed. Trying once more could fail once more, and
        # a request that waits for its blocks at the head of the queue would keep those behind it from giving theirs back.
        failed = tracked.loaded_in_life == request.num_preemptions
        # Who wants the log-probabilities of its prompt needs all of it computed; vLLM heeds that itself only from 0.31 on.
        all_computed = getattr(request, "skip_reading_prefix_cache", False)
        if failed or all_computed or wanted < max(self._settings.min_load_tokens, 1):
            return 0, False
        tracked.load_async = on_drives or wanted > self._load_within_step_max()
        return wanted, tracked.load_async

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
            self._filled.append(chain.block_ids[tracked.local_tokens // group.block_tokens :])
        # Without tokens: nothing to load, or a parked request that is admitted after its load.
        if num_external_tokens <= 0:
            return
        parts = []
        for group, client, chain in zip(self._groups, self._clients, tracked.chains, strict=True):
            first = tracked.local_tokens // group.block_tokens
            end = (tracked.local_tokens + num_external_tokens) // group.block_tokens
            for position, block_ids in group.runs(chain.block_ids[first:end], first):
                parts.append((group, client, chain, position, block_ids))
        # Listed before it is ordered: whatever goes wrong from here, the workers report on it and nobody waits for ever.
        block_ids = parts[0][-1] if len(parts) == 1 else list(itertools.chain.from_iterable(part[-1] for part in parts))
        order = LoadOrder(request.request_id, not tracked.load_async, block_ids)
        self._loads.append(order)
        tracked.loaded_in_life = request.num_preemptions
        for group, client, chain, position, block_ids in parts:
            order.jobs.append((group.index, client.load(chain.sequence, position, block_ids)))
        order.complete = bool(order.jobs)

    # ---- save

    def build_connector_meta(self, output: SchedulerOutput) -> FlexKVMetadata:
        self._step += 1
        meta = FlexKVMetadata(step=self._step)
        meta.loads, self._loads = self._loads, []
        try:
            self._steps.begin(output)
            self._order_saves(output, meta)
        except Exception:
            # The loads are promised to the engine and must reach the workers, whatever happens to the saves. These are
            # all given up: which of them the step would overwrite is not known.
            logger.exception("FlexKV: ordering saves failed; the engine goes on without them")
            meta.saves = []
            self._cancel_all_saves()
        return meta

    def _order_saves(self, output: SchedulerOutput, meta: FlexKVMetadata) -> None:
        overwritten: set[Job] = set()
        self._settle_saves()
        filled, self._filled = self._filled, []
        for block_ids in filled:
            self._saves.add_readers(block_ids, overwritten)
            self._tainted.difference_update(block_ids)
        for new in output.scheduled_new_reqs:
            self._set_tables(new.req_id, new.block_ids, new.num_computed_tokens, overwritten)
        cached = output.scheduled_cached_reqs
        for request_id, computed, tables in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                self._set_tables(request_id, tables, computed, overwritten)
            elif tables:
                self._extend_tables(request_id, tables, overwritten)
        # Before the first new save: these read what the step writes.
        for job in overwritten:
            if (save := self._call_off(job)) is not None:
                save.offers.refused(save.first, self._step, from_start=True)
        for new in output.scheduled_new_reqs:
            self._save_completed(new.req_id, new.num_computed_tokens, output, meta)
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._save_completed(request_id, computed, output, meta)

    def _set_tables(self, request_id: str, tables: tuple[list[int], ...], computed: int, saves: set[Job]) -> None:
        tracked = self._requests.get(request_id)
        for number, group in enumerate(self._groups):
            block_ids = tables[group.index]
            self._overwrite(tracked, block_ids[computed // group.block_tokens :], saves)
            if tracked is not None:
                tracked.chains[number].block_ids = list(block_ids)

    def _extend_tables(self, request_id: str, tables: tuple[list[int], ...], saves: set[Job]) -> None:
        tracked = self._requests.get(request_id)
        for number, group in enumerate(self._groups):
            self._overwrite(tracked, tables[group.index], saves)
            if tracked is not None:
                tracked.chains[number].block_ids.extend(tables[group.index])

    def _overwrite(self, tracked: Tracked | None, block_ids: list[int], saves: set[Job]) -> None:
        self._saves.add_readers(block_ids, saves)
        if tracked is not None and tracked.tainted:
            self._tainted.update(block_ids)
        elif self._tainted:
            self._tainted.difference_update(block_ids)

    def _save_completed(self, request_id: str, computed: int, output: SchedulerOutput, meta: FlexKVMetadata) -> None:
        tracked = self._requests.get(request_id)
        if tracked is None or not tracked.save or tracked.outdated:
            return
        after_step = computed + output.num_scheduled_tokens.get(request_id, 0)
        for group, client, chain in zip(self._groups, self._clients, tracked.chains, strict=True):
            self._save(group, client, chain, tracked.block_hashes(), computed, after_step, meta)

    def _save(
        self,
        group: Group,
        client: Any,
        chain: Chain,
        block_hashes: list[bytes],
        computed: int,
        after_step: int,
        meta: FlexKVMetadata,
    ) -> None:
        """Offers the blocks that are complete after this step and were not offered before."""
        # Only tokens that are certain have hashes: drafts that may yet be rejected, and tokens still being sampled by
        # a step in flight, are saved later.
        hashed = len(block_hashes) // group.hashes_per_block
        full = min(after_step // group.block_tokens, hashed, len(chain.block_ids))
        offers = chain.offers
        if full <= offers.offered or not offers.due(self._step):
            return
        first = max(offers.offered, group.first_live(computed))
        runs = group.runs(chain.block_ids[first:full], first)
        # What lies behind a gap can only be saved if the node has what belongs into it.
        if not runs or runs[-1][0] + len(runs[-1][1]) != full:
            return
        first, blocks = runs[-1]
        if self._tainted and not self._tainted.isdisjoint(blocks):
            offers.refused(first, self._step)
            return
        job = client.save(chain.sequence, group.hashes(block_hashes), first, blocks)
        if job == 0:  # no node, or its ranks are not there yet
            offers.refused(first, self._step)
            return
        offers.offered = full
        meta.saves.append((group.index, job))
        self._saves.add((group.index, job), Save(offers, first, blocks))

    def _settle_saves(self) -> None:
        """Forgets the saves that have ended; what was not kept is offered again later."""
        for number, (group, client) in enumerate(zip(self._groups, self._clients, strict=True)):
            for job, problem in client.take_ended_jobs():
                if (save := self._saves.end((group.index, job))) is None:
                    continue
                if problem:
                    save.offers.refused(save.first, self._step, from_start=problem != "pool_full")
                else:
                    save.offers.kept()
            generation = client.generation()
            if generation != self._generations[number]:
                # Nobody will tell how earlier saves ended, and what was kept may be gone.
                self._generations[number] = generation
                if self._saves.reading() is not None:
                    self._quiet_at = time.monotonic() + _QUIET_SECONDS
                self._cancel_all_saves()
                self._saves.node_lost(group.index)
                self._offer_again()

    def _call_off(self, job: Job) -> Save | None:
        self._clients[job[0]].cancel(job[1])
        return self._saves.call_off(job)

    def _cancel_all_saves(self) -> None:
        for group, job in self._saves.call_off_all():
            self._clients[group].cancel(job)

    def _end_saves(self) -> bool:
        """Calls all saves off and waits until they are quiet; False if they are not in time."""
        self._cancel_all_saves()
        deadline = time.monotonic() + self._settings.save_timeout_ms / 1000
        while (job := self._saves.reading()) is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                logger.error("FlexKV: a save still reads the engine's memory; the engine must not give that away now")
                return False
            self._clients[job[0]].wait_ended_jobs(left)
            self._settle_saves()
        time.sleep(max(self._quiet_at - time.monotonic(), 0))
        return True

    def _offer_again(self) -> None:
        for tracked in self._requests.values():
            for chain in tracked.chains:
                chain.offers.offered = 0

    # ---- the rest of a request's life

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        if (step := self._steps.end()) is not None:
            for client in self._clients:
                client.observe_step(*step)
        if not output.invalid_block_ids and not getattr(output, "failed_recving", None):
            return
        # Blocks that were counted as kept are not, and saves of the last steps were withheld.
        self._offer_again()
        if output.invalid_block_ids:
            self._taint(output.invalid_block_ids)

    def _taint(self, invalid: set[int]) -> None:
        """Of the requests that share a block, vLLM lets the first one compute it again, and has the others rely on that,
        even when the first one is aborted before. What such a request computes may be wrong, and stays in the engine's
        own cache; we keep none of it."""
        for tracked in self._requests.values():
            for chain in tracked.chains:
                first = next((i for i, block in enumerate(chain.block_ids) if block in invalid), None)
                if first is not None:
                    tracked.tainted = True
                    self._tainted.update(chain.block_ids[first:])
        readers: set[Job] = set()
        self._saves.add_readers(list(self._tainted), readers)
        for job in readers:
            self._call_off(job)

    def request_finished(self, request: Request) -> None:
        tracked = self._requests.pop(request.request_id, None)
        if not self._requests:
            self._steps.clear()
        for client, chain in zip(self._clients, tracked.chains if tracked is not None else (), strict=False):
            client.close_sequence(chain.sequence)

    def reset_cache(self) -> bool:
        """What is kept, and what requests have computed so far, is not to be found any more. vLLM also says so before it
        puts its memory to sleep, and where its workers are not told of that, nothing of ours reads it on return. False:
        something still does."""
        for client in self._clients:
            client.reset()
        for tracked in self._requests.values():
            tracked.outdated = True
        return self._end_saves() if self._sleeps_after_reset else True

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
