"""FlexKV behind SGLang's --enable-unified-cache-external-linker: pages go between its device pools and FlexKV directly.

    --unified-cache-external-linker-backend dynamic --unified-cache-external-linker-config
    '{"linker": "FlexKVLinker", "linker_module_path": "flexkv.integration.sglang.linker"}'

Each rank has a linker of its own and keeps its shard under a name of its own; SGLang itself agrees between ranks on what
all of them have. SGLang calls everything here from the scheduler's thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from flexkv.config import Settings, load, untold
from flexkv.integration.common.guard import Guard
from flexkv.integration.common.setup import plain_errors, show_our_logs, wait_until_served
from flexkv.integration.sglang import config as engine
from flexkv.integration.sglang.layers import Batch, LayerCounter
from flexkv.integration.sglang.node import join_node
from flexkv.integration.sglang.pages import NodePlace, PageStore, Piece, open_agent
from flexkv.integration.sglang.pools import Pools, block_numbers, device_pools
from flexkv.manager.place import gpu_register_port, meeting_place

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
    running: set[tuple[str, int]]  # pool and job
    ok: bool
    generations: dict[str, int] = field(default_factory=dict)


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
        settings = _settings(extra_config or {})
        _refuse(server_args, params)
        described = device_pools(params, components)
        rank, self._ranks = _place_among_ranks(params)
        self.forward_stream = forward_stream
        self.pools = dict(described.entries)
        # What all ranks hold alike, the first of them keeps for all.
        self._saves = rank == 0 or not described.replicated
        shard = [0, 1] if described.replicated else [rank, self._ranks]
        self._open(settings, server_args, params, described, shard)
        self.layer_done_counter = LayerCounter(described.num_layers, self._stream)
        if PoolName.MAMBA in self.pools:
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        self._protected: OrderedDict[str, list[tuple[PageStore, list[Piece]]]] = OrderedDict()
        self._queued: dict[str, _Load] = {}
        self._started: dict[int, list[_Load]] = {}
        self._offloads: deque[_Offload] = deque()
        self._closed = False

    def _open(
        self, settings: Settings, server_args: Any, params: Any, described: Pools, shard: list[int]
    ) -> None:
        port = gpu_register_port(engine.engine_port(server_args))
        place = meeting_place(settings, port, 0)
        model = engine.identity(ModelConfig.from_server_args(server_args), server_args)
        facts = {"model": model, "namespace": settings.namespace, "shard": shard, "page": params.page_size}
        who, places = [], []
        for pool in described.pools:
            name = f"{place.engine_id}.{os.getpid()}.{pool.name}"
            fingerprint = json.dumps(facts | {"door": "linker 1", "pool": pool.name, "slots": pool.block_slots})
            digest = hashlib.sha256(fingerprint.encode()).digest()
            who.append((name, 1, f"{server_args.model_path} ({pool.name} {shard[0]})", digest, pool.block_slots))
            places.append(NodePlace(place.runtime_dir, place.node_name, name))
        self._node = join_node(settings, place.node_name, who, logger)
        self._stores: dict[str, PageStore] = {}
        for pool, where, client in zip(described.pools, places, self._node.clients, strict=True):
            self._stores[pool.name] = PageStore(client, open_agent(where, pool, settings), pool)
        wait_until_served(self._node.socket, {one[0] for one in who})

    def _stream(self) -> int:
        """What SGLang computes on. Loads are ordered behind it, too: a forward that runs may still write to slots that a
        finished request has given back."""
        if not torch.cuda.is_initialized():
            return 0
        stream = self.forward_stream if self.forward_stream is not None else torch.cuda.current_stream()
        return stream.cuda_stream

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
                kept, pieces = store.find_scattered(pages[:full])
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
        """Queued, or False: to be computed. With several ranks all must answer alike: there, what one of them cannot load
        has failed in the end."""
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

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        loads = self._started.pop(counter_index, [])
        ok = self.layer_done_counter.finish(counter_index)
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
        self._offloads.append(self._save(transfers) if self._saves else _Offload(set(), True))
        return True

    @_guard.never_raises(lambda: _Offload(set(), False))
    def _save(self, transfers: list[PoolTransfer]) -> _Offload:
        offload = _Offload(set(), True)
        for transfer in transfers:
            store = self._stores.get(str(transfer.name))
            if store is None or not transfer.keys:
                continue
            blocks = block_numbers(transfer.device_indices, store.pool)
            offload.generations[store.pool.name] = store.client.generation()
            jobs, reached = store.save(_hashes(transfer), blocks)
            offload.ok &= reached
            store.agent.arm_saves(jobs, self._stream())
            offload.running.update((store.pool.name, job) for job in jobs)
        return offload

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


def _settings(extra: dict[str, Any]) -> Settings:
    with plain_errors(logger):
        settings = load(extra=extra, extra_origin="linker_extra_config")
    show_our_logs(settings.log_level, settings.logging_prefix)
    for warning in untold(settings):
        logger.warning("FlexKV: %s", warning)
    return settings


def _refuse(server_args: Any, params: Any) -> None:
    if getattr(server_args, "nnodes", 1) > 1:
        raise ValueError("the FlexKV linker: an engine on several machines (--nnodes) is not supported")
    if params.pp_size > 1:
        raise ValueError(
            "the FlexKV linker: pipeline parallelism (--pp-size) is not supported: SGLang does not let the stages agree on "
            "what all of them have"
        )


def _place_among_ranks(params: Any) -> tuple[int, int]:
    """Of those that hold the shards of one request's KV."""
    group = params.attn_tp_cache_group or params.tp_cache_group
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    rank, size = torch.distributed.get_rank(group=group), torch.distributed.get_world_size(group=group)
    return params.attn_cp_rank * size + rank, params.attn_cp_size * size
