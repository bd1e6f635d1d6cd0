"""FlexKV behind SGLang's HiCache, as its `dynamic` storage backend: pages go between HiCache's host memory and FlexKV.

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
    '{"backend_name": "flexkv", "module_path": "flexkv.integration.sglang.hicache",
      "class_name": "FlexKVHiCacheStorage", "interface_v1": 1}'

SGLang calls it from threads of its own, which wait here for the copies; each rank keeps its shard by itself.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig, PoolName
from sglang.srt.runtime_context import get_server_args

from flexkv.integration.common.guard import Guard
from flexkv.integration.sglang.node import load_settings, open_stores
from flexkv.integration.sglang.pages import PageStore
from flexkv.integration.sglang.pools import block_numbers, host_pool

logger = logging.getLogger("flexkv.sglang")
_guard = Guard(logger)

_NODE_ANSWERS_SECONDS = 1.0


class FlexKVHiCacheStorage(HiCacheStorage):
    """Thread-safe. ValueError: an engine or a pool that this door cannot serve."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any]) -> None:
        extra = storage_config.extra_config or {}
        if not extra.get("interface_v1"):
            raise ValueError(
                'FlexKV as HiCache\'s storage: add "interface_v1": 1 to --hicache-storage-backend-extra-config; '
                "without it SGLang would copy each page once more"
            )
        self._config = storage_config
        self._settings = load_settings(extra.get("flexkv", {}), "hicache-storage-backend-extra-config")
        self._lock = threading.Lock()  # of the client
        self._node: Any = None
        self._store: PageStore

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self.close()
        config = self._config
        shard = [0, 1] if config.is_mla_model else [config.tp_rank, config.tp_size]
        place = [config.pp_rank, config.pp_size, config.attn_cp_rank, config.attn_cp_size]
        facts = {"door": "hicache 1", "shard": shard, "place": place, "layout": mem_pool_host.layout}
        pool = host_pool(mem_pool_host)
        self._node, stores = open_stores(self._settings, get_server_args(), [pool], facts, from_drives=True)
        self._store = stores[pool.name]

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        if host_pool_name != PoolName.KV:
            raise ValueError(
                f"FlexKV as HiCache's storage cannot keep pool '{host_pool_name}': only models with full attention are "
                "supported. Use the external linker (docs/engines/sglang.md)"
            )
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    @_guard.never_raises(lambda: 0)
    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many leading pages are kept, in host memory or on drives."""
        with self._lock:
            count, pieces = self._store.find(_hashes(keys))
            self._store.close(pieces)
        return count

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Waits for the copies. False: a page that must not be used."""
        return self._get(keys, host_indices) or [False] * len(keys)

    @_guard.never_raises(list)
    def _get(self, keys: list[str], host_indices: torch.Tensor) -> list[bool]:
        store = self._store
        blocks = block_numbers(host_indices, store.pool)
        with self._lock:
            _, pieces = store.find(_hashes(keys))
            jobs = store.load(pieces, blocks)
        store.agent.arm_loads(jobs, 0)
        incomplete = dict(store.agent.wait_loads(jobs))
        loaded = [False] * len(keys)
        for piece, job in zip(pieces, jobs, strict=True):
            good = incomplete.get(job, piece.count)
            loaded[piece.at : piece.at + good] = [True] * good
        with self._lock:
            store.close(pieces)
        return loaded

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Waits for the copies: on return SGLang may overwrite its pages."""
        return [self._set(keys, host_indices)] * len(keys)

    @_guard.never_raises(lambda: False)
    def _set(self, keys: list[str], host_indices: torch.Tensor) -> bool:
        store = self._store
        blocks = block_numbers(host_indices, store.pool)
        with self._lock:
            jobs, reached = store.save(_hashes(keys), blocks)
        store.agent.arm_saves(jobs, 0)
        store.agent.fence(jobs, self._settings.save_timeout_ms)
        return self._kept(set(jobs)) and reached

    def _kept(self, jobs: set[int]) -> bool:
        """The node's word on jobs that have ended at the agent: it comes in a moment, or the node is gone. SGLang saves
        from one thread only."""
        left = set(jobs)
        kept = True
        with self._lock:
            while left:
                for job, problem in self._store.client.take_ended_jobs():
                    if job in left:
                        left.discard(job)
                        kept &= not problem
                if left and not self._store.client.wait_ended_jobs(_NODE_ANSWERS_SECONDS):
                    return False
        return kept

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    @_guard.never_raises(lambda: None)
    def clear(self) -> None:
        """SGLang's /clear_hicache_storage_backend: nothing that was kept before is found any more."""
        with self._lock:
            self._store.client.reset()

    # ---- the older interface, which SGLang does not use with "interface_v1"

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        raise NotImplementedError('FlexKV copies whole pages between pools: "interface_v1"')

    batch_get = set = batch_set = get  # type: ignore[assignment]

    def close(self) -> None:
        """On return nothing touches HiCache's memory."""
        if self._node is not None:
            self._store.stop()
            self._node.close()
            self._node = None


def _hashes(keys: list[str]) -> list[bytes]:
    return [bytes.fromhex(key) for key in keys]
