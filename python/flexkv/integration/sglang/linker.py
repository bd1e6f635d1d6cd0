"""FlexKV behind SGLang's --enable-unified-cache-external-linker: pages go between its device pools and FlexKV directly.

    --unified-cache-external-linker-backend dynamic --unified-cache-external-linker-config
    '{"linker": "FlexKVLinker", "linker_module_path": "flexkv.integration.sglang.linker"}'

Each rank has a linker of its own and keeps its shard under a name of its own; SGLang itself agrees between ranks on
what all of them have. SGLang calls everything here from the scheduler's thread.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from flexkv.integration.common.guard import Guard
from flexkv.integration.sglang.layers import Batch, LayerCounter, Streams
from flexkv.integration.sglang.node import load_settings, open_stores
from flexkv.integration.sglang.pages import PageStore, Piece
from flexkv.integration.sglang.pools import block_numbers, device_pools

logger = logging.getLogger("flexkv.sglang")
_guard = Guard(logger)

# Requests whose pages are protected since their last lookup: the newest.
_PROTECTED_MAX = 256
# A flush waits so long for saves under way; then they are given up.
_FLUSH_MS = 5_000


@dataclass
class _Load:
    """Of one request, ordered and not begun."""

    jobs: dict[PageStore, list[int]]
    pieces: list[tuple[PageStore, list[Piece]]]
    complete: bool  # every page was found


@dataclass
class _Offload:
    running: set[tuple[str, int]] = field(default_factory=set)  # pool and job
    ok: bool = True
    generations: dict[str, int] = field(default_factory=dict)  # of the pools' clients


class FlexKVLinker(UnifiedCacheLinker):
    """ValueError: an engine or pools that this door cannot serve."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[Any],
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        settings = load_settings(extra_config or {}, "linker_extra_config")
        _refuse(server_args, params)
        described = device_pools(params, components)
        rank, self._ranks = _place_among_ranks(params)
        self.forward_stream = forward_stream
        self.pools = dict(described.entries)
        # What all ranks hold alike, the first of them keeps for all.
        self._saves = rank == 0 or not described.replicated
        shard = [0, 1] if described.replicated else [rank, self._ranks]
        facts = {"door": "linker 1", "shard": shard, "page": params.page_size}
        self._node, self._stores = open_stores(settings, server_args, described.pools, facts)
        self._streams = Streams(forward_stream)
        self.layer_done_counter = LayerCounter(described.num_layers, self._streams)
        if PoolName.MAMBA in self.pools:
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        self._protected: OrderedDict[str, list[tuple[PageStore, list[Piece]]]] = OrderedDict()
        self._queued: dict[str, _Load] = {}
        self._started: dict[int, list[_Load]] = {}
        self._offloads: deque[_Offload] = deque()
        self._closed = False

    # ---- lookup

    @_guard.never_raises(list)
    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """All prefix lengths, in pages, of which this rank has every page that SGLang would load."""
        self._unprotect(rid)
        wanted = {str(transfer.name): transfer for transfer in transfers}
        if set(wanted) != set(self._stores):
            return []
        held: list[tuple[PageStore, list[Piece]]] = []
        self._protected[rid] = held
        pages = _hashes(wanted["kv"])
        full, pieces = self._stores["kv"].find(pages)
        held.append((self._stores["kv"], pieces))
        lengths = set(range(1, full + 1))
        for name, store in self._stores.items():
            if name != "kv" and lengths:
                find = store.find_alone if name == str(PoolName.MAMBA) else store.find_scattered
                kept, pieces = find(pages[:full])
                held.append((store, pieces))
                window = len(wanted[name].keys)
                lengths = {n for n in lengths if all(page in kept for page in range(max(0, n - window), n))}
        while len(self._protected) > _PROTECTED_MAX:
            self._unprotect(next(iter(self._protected)))
        return sorted(lengths)

    def _unprotect(self, rid: str) -> None:
        for store, pieces in self._protected.pop(rid, []):
            store.close(pieces)

    # ---- loads

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queued, or False: to be computed. With several ranks all must answer alike: there, what one of them cannot
        load has failed in the end."""
        self._queued[rid] = load = self._order(transfers)
        self._unprotect(rid)
        if load.complete or self._ranks > 1:
            return True
        self.cancel_queued_load(rid)
        return False

    @_guard.never_raises(lambda: _Load({}, [], False))
    def _order(self, transfers: list[PoolTransfer]) -> _Load:
        load = _Load({}, [], True)
        for transfer in transfers:
            if not transfer.keys:
                continue
            store = self._stores[str(transfer.name)]
            blocks = block_numbers(transfer.device_indices, store.pool)
            count, pieces = store.find(_hashes(transfer))
            load.pieces.append((store, pieces))
            load.complete &= count == len(blocks) == len(transfer.keys)
            if load.complete:
                load.jobs[store] = store.load(pieces, blocks)
        return load

    @_guard.never_raises(lambda: False)
    def cancel_queued_load(self, rid: str) -> bool:
        """What was not armed touches nothing."""
        load = self._queued.pop(rid, None)
        if load is None:
            return False
        for store, jobs in load.jobs.items():
            store.agent.cancel(jobs)
            for job in jobs:
                store.client.cancel(job)
        self._end(load)
        return True

    @_guard.never_raises(lambda: -1)
    def start_layer_wise_loading(self) -> int:
        if not self._queued:
            return -1
        loads, self._queued = list(self._queued.values()), {}
        jobs: dict[PageStore, list[int]] = {}
        for load in loads:
            for store, of_request in load.jobs.items():
                jobs.setdefault(store, []).extend(of_request)
        index = self.layer_done_counter.begin([Batch(store, of_store) for store, of_store in jobs.items()])
        self._started[index] = loads
        return index

    @_guard.never_raises(lambda: False)
    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """False also of what was never started: SGLang asks only after loads that were queued."""
        loads = self._started.pop(counter_index, [])
        ok = bool(loads) and self.layer_done_counter.finish(counter_index)
        for load in loads:
            self._end(load)
            ok &= load.complete
        return ok

    @staticmethod
    def _end(load: _Load) -> None:
        for store, pieces in load.pieces:
            store.close(pieces)

    # ---- offloads

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Refused only where there is nothing to keep: with several ranks all must answer alike."""
        if not any(transfer.keys for transfer in transfers):
            return False
        offload = _Offload()
        self._offloads.append(offload)
        if self._saves:
            offload.ok = self._save(offload, transfers)
        return True

    @_guard.never_raises(lambda: False)
    def _save(self, offload: _Offload, transfers: list[PoolTransfer]) -> bool:
        """What was begun is always waited for: what it reads must not change meanwhile."""
        ok = True
        for transfer in transfers:
            store = self._stores.get(str(transfer.name))
            if store is None or not transfer.keys:
                continue
            blocks = block_numbers(transfer.device_indices, store.pool)
            offload.generations[store.pool.name] = store.client.generation()
            jobs, reached = store.save(_hashes(transfer), blocks)
            ok &= reached
            offload.running.update((store.pool.name, job) for job in jobs)
            store.agent.arm_saves(jobs, self._streams.launched())
        return ok

    def num_completed_offloads(self) -> int:
        self._settle()
        count = 0
        for offload in self._offloads:
            if offload.running:
                break
            count += 1
        return count

    def pop_completed_offload(self) -> bool:
        return self._offloads.popleft().ok

    @_guard.never_raises(lambda: None)
    def _settle(self) -> None:
        if not self._offloads:
            return
        for name, store in self._stores.items():
            ended = dict(store.client.take_ended_jobs())
            generation = store.client.generation()
            for offload in self._offloads:
                for one in [one for one in offload.running if one[0] == name]:
                    # A node that went away does not say how its jobs ended.
                    lost = generation != offload.generations[name]
                    if one[1] in ended or lost:
                        offload.running.discard(one)
                        offload.ok &= not ended.get(one[1], "lost")

    # ---- ends

    @_guard.never_raises(lambda: None)
    def reset(self) -> None:
        """SGLang's cache is flushed: what FlexKV keeps stays. On return no transfer runs."""
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        for index in list(self._started):
            self.finish_layer_wise_loading(index)
        for rid in list(self._protected):
            self._unprotect(rid)
        self._settle()
        for name, store in self._stores.items():
            store.agent.fence([job for one in self._offloads for pool, job in one.running if pool == name], _FLUSH_MS)
        self._offloads.clear()

    def close(self) -> None:
        """On return nothing touches the device pools."""
        if self._closed:
            return
        self._closed = True
        self.reset()
        for store in self._stores.values():
            store.stop()
        self._node.close()


def _hashes(transfer: PoolTransfer) -> list[bytes]:
    return [bytes.fromhex(key) for key in transfer.keys or ()]


def _refuse(server_args: Any, params: Any) -> None:
    if getattr(server_args, "nnodes", 1) > 1:
        raise ValueError("the FlexKV linker: an engine on several machines (--nnodes) is not supported")
    if getattr(server_args, "enable_memory_saver", False):
        raise ValueError(
            "the FlexKV linker: --enable-memory-saver is not supported: it takes device memory away while FlexKV copies"
        )
    if params.pp_size > 1:
        raise ValueError(
            "the FlexKV linker: pipeline parallelism (--pp-size) is not supported: SGLang does not let the stages agree "
            "on what all of them have"
        )


def _place_among_ranks(params: Any) -> tuple[int, int]:
    """Of those that hold the shards of one request's KV."""
    group = params.attn_tp_cache_group or params.tp_cache_group
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    rank, size = torch.distributed.get_rank(group=group), torch.distributed.get_world_size(group=group)
    return params.attn_cp_rank * size + rank, params.attn_cp_size * size
