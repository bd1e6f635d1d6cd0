"""SGLang's own prefix cache and KV pools in one process, with tensors on the CPU, for test_sglang_linker.py: prompts
are "computed" by filling their pages with what only their tokens determine, and checked when they are loaded."""

from __future__ import annotations

import hashlib
import itertools
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.configs.mamba_utils import KimiLinearCacheParams, KimiLinearStateShape
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MHATokenToKVPool,
    MLATokenToKVPool,
    ReqToTokenPool,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.sampling.sampling_params import SamplingParams

PAGE, LAYERS, WINDOW = 16, 3, 2
_PATIENCE_SECONDS = 60


def tokens(count: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + i * i + 3 * i) % 50_000 for i in range(count)]


class Cache:
    """One engine's, with a linker attached as SGLang does it."""

    def __init__(self, server_args: Any, kind: str = "mha", slots: int = 2048) -> None:
        """`kind`: mha, mla, swa: layer 1 with a window of WINDOW pages; mamba, mamba-mha: layer 1 with a state."""
        common = {"page_size": PAGE, "dtype": torch.float32, "device": "cpu", "enable_memory_saver": False}
        heads = {"head_num": 2, "head_dim": 8}
        allocator = [PAGE, torch.float32, "cpu"]
        components = (ComponentType.FULL,)
        rows: Any = ReqToTokenPool(size=8, max_context_len=slots, device="cpu", enable_memory_saver=False)
        if kind == "mla":
            self.kv: Any = MLATokenToKVPool(slots, layer_num=LAYERS, kv_lora_rank=8, qk_rope_head_dim=4, **common)
        elif kind == "mha":
            self.kv = MHATokenToKVPool(slots, layer_num=LAYERS, **heads, **common)
        elif kind.startswith("mamba"):
            rows = _rows_with_states(slots)
            latents = {"use_mla": True, "kv_lora_rank": 8, "qk_rope_head_dim": 4} if kind == "mamba" else {}
            own = {"full_attention_layer_ids": [0, 2], "mamba_pool": rows.mamba_pool}
            self.kv = HybridLinearKVPool(slots, **own, **latents, **heads, **common)
            components = (ComponentType.FULL, ComponentType.MAMBA)
        else:
            layers = {"swa_attention_layer_ids": [1], "full_attention_layer_ids": [0, 2]}
            self.kv = SWAKVPool(slots, slots, **layers, **heads, **common)
            components = (ComponentType.FULL, ComponentType.SWA)
        self.windowed = kind == "swa"
        self.rows = rows
        self.states = rows.mamba_pool.mamba_cache if kind.startswith("mamba") else None
        self.latents = kind in ("mla", "mamba")
        if self.windowed:
            self.allocator: Any = SWATokenToKVPoolAllocator(slots, slots, *allocator, self.kv, need_sort=False)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(slots, *allocator, self.kv, need_sort=False)
        self.params = CacheInitParams(
            disable=False,
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=PAGE,
            tree_components=components,
            sliding_window_size=WINDOW * PAGE if self.windowed else None,
            enable_mamba_extra_buffer=self.states is not None,
        )
        self.cache = UnifiedRadixCache(self.params)
        self.linker = create_unified_cache_linker(
            server_args,
            self.params,
            backend="dynamic",
            config=server_args.unified_cache_external_linker_config,
            components=set(self.cache.components),
        )
        self.cache.init_cache_linker(self.linker)
        self.kv.register_layer_transfer_counter(self.linker.layer_done_counter)
        for store in self.linker._stores.values():  # what comes before is not kept
            assert store.agent.wait_attached(_PATIENCE_SECONDS) and _is_served(store.client)
        self._names = map("request-{}".format, itertools.count())

    def run(
        self,
        prompt: Sequence[int],
        salt: str | None = None,
        extra_key: str | None = None,
        between: Callable[[str], None] = lambda step: None,
        patience: float = _PATIENCE_SECONDS,
    ) -> tuple[int, int]:
        """(tokens found on the device, tokens loaded). `between`: called with the names of the steps as they come."""
        key = RadixKey(array("q", prompt), extra_key=extra_key, cache_salt=salt)
        sampling = SamplingParams(max_new_tokens=1)
        req = Req(next(self._names), "", array("q", prompt), sampling, extra_key=extra_key, cache_salt=salt)
        match = self.cache.match_prefix(MatchPrefixParams(key=key, req=req))
        between("matched")
        req.last_node = match.last_device_node
        root = self.cache.root_node_handle(extra_key)
        held = self.cache.tree_core.collect_full_device_indices(match.last_device_node, root)
        loaded = self._load(req, match, prompt, salt, extra_key, between)
        rest = len(prompt) - len(held) - len(loaded)
        slots = torch.cat([held, loaded, self._alloc(rest)])
        self._fill(prompt, slots, len(held) + len(loaded), salt, extra_key)
        evicted = {ComponentType.SWA: req.kv.get_evicted_seqlen(ComponentType.SWA)} if self.windowed and req.kv else {}
        params = InsertParams(key=key, value=slots, prev_prefix_len=len(held), component_evicted_seqlens=evicted)
        if self.states is not None:
            params.mamba_value = self._state_after(_content(prompt, salt, extra_key))
        inserted = self.cache.insert(params)
        if self.states is not None:
            unused = [params.mamba_value] if inserted.mamba_exist else []
            unused += [req.kv.mamba_pool_idx.unsqueeze(0)] if req.kv.holds_mamba else []
            for slot in unused:
                self.rows.mamba_allocator.free(slot)
        between("inserted")
        self.settle(patience)
        return len(held), len(loaded)

    def _alloc(self, count: int) -> torch.Tensor:
        if not self.windowed:
            return self.allocator.alloc(count)
        slots = self.allocator.full_attn_allocator.alloc(count)
        self.allocator.set_full_to_swa_mapping(slots, self.allocator.swa_attn_allocator.alloc(count))
        return slots

    def _load(
        self, req: Any, match: Any, prompt: Sequence[int], salt: Any, extra_key: Any, between: Callable[[str], None]
    ) -> torch.Tensor:
        if match.host_hit_length == 0:
            return torch.empty(0, dtype=torch.int64)
        params = InitLoadBackParams(match.best_match_node, match.host_hit_length, req=req)
        count, _ = self.cache.init_load_back(params)
        between("ordered")
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        slots = self.cache.linker.private_load_indices[req.rid]
        self.linker.layer_done_counter.set_consumer(self.cache.ready_to_load_host_cache())
        right = True
        for layer in range(LAYERS):
            if self._has_state(layer):
                self.rows.mamba2_layer_cache(layer)  # waits, as a forward does
                expected = _content(prompt[: match.device_prefix_len + count], salt, extra_key)
                right &= all(bool((one[req.kv.mamba_pool_idx] == expected).all()) for one in self._parts_of_states())
                continue
            keys, values = self._layer(layer)  # waits
            first, end = match.device_prefix_len // PAGE, (match.device_prefix_len + count) // PAGE
            for page in range(max(first, end - WINDOW) if self._is_windowed(layer) else first, end):
                at = self._rows(layer, slots[(page - first) * PAGE :][:PAGE])
                expected = _content(prompt[: (page + 1) * PAGE], salt, extra_key)
                right &= bool((keys[at] == expected + layer).all()) and bool((values[at] == expected - layer).all())
        failed = self.cache.finish_external_linker_loads([req])
        between("failed" if failed else "finished")
        if failed:
            self.allocator.free(slots)
            return torch.empty(0, dtype=torch.int64)
        assert right, "a loaded page does not hold what was computed"
        return slots

    def _has_state(self, layer: int) -> bool:
        return self.states is not None and layer == 1

    def _parts_of_states(self) -> list[torch.Tensor]:
        """Of the one layer that has them, by slot."""
        assert self.states is not None
        return [self.states.temporal[0], *(part[0] for part in self.states.conv)]

    def _state_after(self, content: float) -> torch.Tensor:
        slot = self.rows.mamba_allocator.alloc(1)
        for part in self._parts_of_states():
            part[slot] = content
        return slot

    def _is_windowed(self, layer: int) -> bool:
        return self.windowed and layer == 1

    def _rows(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        return self.allocator.translate_loc_from_full_to_swa(slots) if self._is_windowed(layer) else slots

    def _layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.latents:
            both = self.kv.get_key_buffer(layer)
            return both[..., :8], both[..., :8] - 2 * layer
        return self.kv.get_key_buffer(layer), self.kv.get_value_buffer(layer)

    def _fill(self, prompt: Sequence[int], slots: torch.Tensor, first: int, salt: Any, extra_key: Any) -> None:
        for page in range(first // PAGE, len(prompt) // PAGE):
            at = slots[page * PAGE : (page + 1) * PAGE]
            content = _content(prompt[: (page + 1) * PAGE], salt, extra_key)
            for layer in range(LAYERS):
                if self._has_state(layer):
                    continue
                if self.latents:
                    self.kv.get_key_buffer(layer)[at] = content + layer
                    continue
                rows = self._rows(layer, at)
                self.kv.get_key_buffer(layer)[rows] = content + layer
                self.kv.get_value_buffer(layer)[rows] = content - layer

    def settle(self, patience: float) -> None:
        """Until nothing is on its way to FlexKV."""
        deadline = time.monotonic() + patience
        while self.cache.linker.pending_offloads:
            self.cache.check_hicache_events()
            assert time.monotonic() < deadline, "an offload does not end"
            time.sleep(0.001)

    def flush(self) -> None:
        """As SGLang's /flush_cache."""
        self.cache.reset()
        self.allocator.clear()
        if self.states is not None:
            self.rows.mamba_allocator.clear()
        for buffer in self.linker.pools.values():
            for tensor in buffer.kv_buffer:
                tensor.zero_()

    def evict(self, count: int) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.cache.evict(EvictParams(num_tokens=count))

    def close(self) -> None:
        self.linker.close()


def _rows_with_states(slots: int) -> Any:
    shape = KimiLinearStateShape.create(tp_world_size=1, num_heads=2, head_dim=8)
    return HybridReqToTokenPool(
        **{"size": 8, "max_context_len": slots, "device": "cpu", "enable_memory_saver": False},
        **{"mamba_size": 16, "mamba_spec_state_size": 0, "mamba_layer_ids": [1], "enable_mamba_extra_buffer": True},
        cache_params=KimiLinearCacheParams(shape=shape, layers=[1]),
    )


def _is_served(client: Any) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not client.served(0.01):
        if time.monotonic() > deadline:
            return False
    return True


def _content(prefix: Sequence[int], salt: Any, extra_key: Any) -> float:
    digest = hashlib.sha256(repr((list(prefix), salt, extra_key)).encode()).digest()
    return float(int.from_bytes(digest[:2], "little") + 1)
