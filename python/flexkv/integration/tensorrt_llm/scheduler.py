"""The scheduler side, on rank 0, in the thread of the executor's loop: looks prompts up, orders loads and saves.

Loads run beside the steps, with their request parked; a load within a step could fail when nothing can be taken back.
Saves are ordered in the step that completes their blocks. TensorRT-LLM gives blocks to others as soon as a request has
finished, so before a step that is going to write to a block, the node is told to keep nothing of the saves that still
read it (docs/decisions/0010).
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from array import array
from typing import Any

from flexkv import _core
from flexkv.config import Settings
from flexkv.integration.common.saves import Offers, RunningSaves, Save
from flexkv.integration.common.setup import open_node
from flexkv.integration.tensorrt_llm import identity
from flexkv.integration.tensorrt_llm.engine import Engine
from flexkv.integration.tensorrt_llm.metadata import Load, Place, StepMeta

logger = logging.getLogger("flexkv.tensorrt_llm")

# TensorRT-LLM does not always say that a request was canceled: the oldest of so many are forgotten.
_REQUESTS_MAX = 8192


class _Tracked:
    """A request as far as the cache is concerned."""

    __slots__ = (
        *("block_ids", "hashed_tokens", "hashes", "local_tokens", "offers", "promised_tokens"),
        *("salted", "save", "sequence", "told_tokens"),
    )

    def __init__(self, sequence: int, hashes: Any, tokens: int, salted: bool) -> None:
        self.sequence = sequence
        self.hashes = hashes  # of the first `hashed_tokens` tokens
        self.hashed_tokens = tokens
        self.salted = salted
        self.save = True
        self.offers = Offers()
        self.local_tokens = 0  # in the engine's own cache at the last lookup
        self.promised_tokens = 0  # to be loaded behind those
        self.block_ids: list[int] | None = None  # None: the steps have not begun to tell them
        self.told_tokens = 0  # in steps


class SchedulerSide:
    def __init__(self, engine: Engine, settings: Settings) -> None:
        engine_id = f"tensorrt-llm-{uuid.uuid4().hex}"
        target = settings.node_target
        own_name = "engine-" + hashlib.sha256(engine_id.encode()).hexdigest()[:24]
        fingerprint = engine.fingerprint(settings.namespace)
        who = (engine_id, engine.rank_count, engine.model, fingerprint, engine.block_tokens)
        self.place = Place(own_name if target.mode == "embedded" else target.name, engine_id)
        self._node = open_node(settings, own_name, [who], logger)
        (self._client,) = self._node.clients
        self._block_tokens = engine.block_tokens
        self._min_load_tokens = max(settings.min_load_tokens, 1)
        self._requests: dict[int, _Tracked] = {}
        self._saves = RunningSaves()
        self._ordered: list[Load] = []  # since the last step
        self._loading: dict[int, tuple[int, frozenset[int]]] = {}  # by request: job, and the blocks that it fills
        self._revoked_loads: list[int] = []
        self._generation = 0  # of the client's connection, at the last step
        self._step = 0
        self._unsupported_told = False

    # ---- lookup and load

    def get_num_new_matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int, bool]:
        self._forget(request.request_id)  # asked again: it begins anew, in other blocks
        if request.request_id in self._loading:
            self._revoke_load(request.request_id)
        if not self._may_be_kept(request):
            return 0, False
        tracked = self._track(request)
        host, matched = self._client.lookup_in_host_memory(
            tracked.sequence, tracked.hashes, computed_tokens // self._block_tokens
        )
        # A load from a drive may fail, which cannot be told: it is there when asked for the next time.
        if matched > host:
            self._client.prefetch(tracked.sequence, tracked.hashes)
        tracked.offers.restart(matched)
        tracked.local_tokens = computed_tokens
        # The last token is always computed: its logits are what the engine is asked for.
        served = min(host, (tracked.hashed_tokens - 1) // self._block_tokens) * self._block_tokens
        wanted = served - computed_tokens
        if computed_tokens % self._block_tokens != 0 or wanted < self._min_load_tokens:
            return 0, False
        tracked.promised_tokens = wanted
        return wanted, True

    def _track(self, request: Any) -> _Tracked:
        tokens = array("q", request.get_tokens(0))
        parts = identity.namespace(request, self.place.engine_id)
        hashes = _core.TokenHashes(tokens, self._block_tokens, parts)
        if len(self._requests) >= _REQUESTS_MAX:
            self._forget(next(iter(self._requests)))
        tracked = _Tracked(self._client.open_sequence(), hashes, len(tokens), identity.is_salted(parts))
        self._requests[request.request_id] = tracked
        return tracked

    def _may_be_kept(self, request: Any) -> bool:
        why = identity.unsupported(request)
        if why and not self._unsupported_told:
            self._unsupported_told = True
            logger.warning(
                "FlexKV: request %s is computed without the cache: %s. So are others like it", request.request_id, why
            )
        return not why

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        request_id = request.request_id
        tracked = self._requests.get(request_id)
        first = tracked.local_tokens // self._block_tokens if tracked is not None else 0
        self._overwrite(block_ids[first:])
        if tracked is None:
            return
        # Of its Python side the engine shows more than at the lookup.
        tracked.save = tracked.save and self._may_be_kept(request)
        promised, tracked.promised_tokens = tracked.promised_tokens, 0
        if promised == 0:
            return
        # Listed before it is ordered: whatever goes wrong from here, the workers know of it.
        load = Load(request_id)
        self._ordered.append(load)
        blocks = block_ids[first : first + promised // self._block_tokens]
        load.job = self._client.load(tracked.sequence, first, blocks)
        self._loading[request_id] = load.job, frozenset(blocks)

    # ---- save

    def build_connector_meta(self, output: Any) -> StepMeta:
        self._step += 1
        meta = StepMeta(self._step, self.place)
        meta.loads, self._ordered = self._ordered, []
        try:
            self._order_saves(output, meta)
        except Exception:
            # The loads are promised and must reach the workers, whatever happens to the saves. These are all given up:
            # which of them the step would overwrite is not known.
            logger.exception("FlexKV: ordering saves failed; the engine goes on without them")
            meta.saves = []
            self._cancel_all_saves()
        meta.revoked_loads, self._revoked_loads = self._revoked_loads, []
        return meta

    def _order_saves(self, output: Any, meta: StepMeta) -> None:
        self._settle()
        # Before the first new save: these read what the step writes.
        for data in output.new_requests:
            self._overwrite(data.new_block_ids[data.computed_position // self._block_tokens :])
        for data in output.cached_requests:
            self._overwrite(data.new_block_ids)
        for data in output.new_requests:
            self._loading.pop(data.request_id, None)  # it runs, so every rank has reported it
            if (tracked := self._requests.get(data.request_id)) is not None:
                tracked.block_ids, tracked.told_tokens = [], 0
                self._save_completed(tracked, tracked.block_ids, data, meta)
        for data in output.cached_requests:
            tracked = self._requests.get(data.request_id)
            # Of a request that was paused and begins anew, some versions tell only what was added to its earlier life.
            if tracked is not None and tracked.block_ids is not None:
                self._save_completed(tracked, tracked.block_ids, data, meta)

    def _overwrite(self, block_ids: list[int]) -> None:
        """Their request may write to these blocks from the next step on."""
        if not block_ids:
            return
        readers: set[tuple[int, int]] = set()
        self._saves.add_readers(block_ids, readers)
        for reader in readers:
            self._client.cancel(reader[1])
            if (save := self._saves.call_off(reader)) is not None:
                save.offers.refused(save.first, self._step, from_start=True)
        # A request was canceled while it waited for its load, which TensorRT-LLM does not tell.
        for request_id in [other for other, (_, filled) in self._loading.items() if not filled.isdisjoint(block_ids)]:
            self._revoke_load(request_id)

    def _revoke_load(self, request_id: int) -> None:
        job, _ = self._loading.pop(request_id)
        self._revoked_loads.append(job)
        self._client.cancel(job)

    def _save_completed(self, tracked: _Tracked, block_ids: list[int], data: Any, meta: StepMeta) -> None:
        """Offers the blocks that are complete after this step and were not offered before. `block_ids`: the request's,
        without those that this step adds."""
        block_ids.extend(data.new_block_ids)
        self._take_tokens(tracked, data.new_tokens)
        # A salt that the lookup did not tell is in none of the keys.
        if getattr(data, "cache_salt", None) is not None and not tracked.salted:
            tracked.save = False
        # Before 1.2 the engine does not say what it schedules; then blocks are saved a step later.
        after_step = data.computed_position + getattr(data, "num_scheduled_tokens", 0)
        # Tokens still being sampled by a step in flight have no hashes yet.
        full = min(after_step // self._block_tokens, len(tracked.hashes), len(block_ids))
        offers = tracked.offers
        if not tracked.save or full <= offers.offered or not offers.due(self._step):
            return
        first = offers.offered
        blocks = block_ids[first:full]
        if min(blocks) < 0:  # given back, or never there (windows)
            tracked.save = False
            return
        job = self._client.save(tracked.sequence, tracked.hashes, first, blocks)
        if job == 0:  # no node, or its ranks are not there yet
            offers.refused(first, self._step)
            return
        offers.offered = full
        meta.saves.append(job)
        self._saves.add((0, job), Save(offers, first, blocks))

    def _take_tokens(self, tracked: _Tracked, new_tokens: list[int]) -> None:
        known = tracked.hashed_tokens - tracked.told_tokens  # of the new ones
        tracked.told_tokens += len(new_tokens)
        if known < len(new_tokens):
            tracked.hashes.append(array("q", new_tokens[known:]))
            tracked.hashed_tokens = tracked.told_tokens

    def _settle(self) -> None:
        """Forgets what has ended; what was not kept is offered again later."""
        loads = {job: request_id for request_id, (job, _) in self._loading.items()}
        for job, problem in self._client.take_ended_jobs():
            if (save := self._saves.end((0, job))) is not None:
                if problem:
                    save.offers.refused(save.first, self._step, from_start=problem != "pool_full")
                else:
                    save.offers.kept()
            elif job in loads:
                del self._loading[loads[job]]
        generation = self._client.generation()
        if generation != self._generation:
            # Nobody will tell how earlier saves ended, and what was kept may be gone.
            self._generation = generation
            self._cancel_all_saves()
            self._saves.node_lost(0)
            for tracked in self._requests.values():
                tracked.offers.offered = 0

    def _cancel_all_saves(self) -> None:
        for _, job in self._saves.call_off_all():
            self._client.cancel(job)

    # ---- the end of a request

    def request_finished(self, request_id: int) -> bool:
        """Whether its blocks are still being written to (it was canceled while it waited for its load)."""
        self._forget(request_id)
        self._settle()
        loading = self._loading.pop(request_id, None) is not None
        untold = [load for load in self._ordered if load.request_id == request_id]
        if not untold:
            return loading
        # No worker has heard of the load, so none can say that it has ended, and none will begin it.
        self._ordered = [load for load in self._ordered if load.request_id != request_id]
        for load in untold:
            self._client.cancel(load.job)
        return False

    def _forget(self, request_id: int) -> None:
        if (tracked := self._requests.pop(request_id, None)) is not None:
            self._client.close_sequence(tracked.sequence)

    def shutdown(self) -> None:
        self._node.close()
