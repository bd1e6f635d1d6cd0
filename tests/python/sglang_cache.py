"""SGLang's own prefix cache and KV pools in one process, with tensors on the CPU, for test_sglang_linker.py: prompts are
"computed" by filling their pages with what only their tokens determine, and checked when they are loaded."""

from __future__ import annotations

import hashlib
import itertools
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.sampling.sampling_params import SamplingParams

PAGE, LAYERS = 16, 3
_PATIENCE_SECONDS = 60


def tokens(count: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + i * i + 3 * i) % 50_000 for i in range(count)]


class Cache:
    """One engine's, with a linker attached as SGLang does it."""

    def __init__(self, server_args: Any, mla: bool = False, slots: int = 2048) -> None:
        common = {"size": slots, "page_size": PAGE, "dtype": torch.float32, "layer_num": LAYERS, "device": "cpu"}
        if mla:
            self.kv: Any = MLATokenToKVPool(**common, kv_lora_rank=8, qk_rope_head_dim=4, enable_memory_saver=False)
        else:
            self.kv = MHATokenToKVPool(**common, head_num=2, head_dim=8, enable_memory_saver=False)
        self.allocator = PagedTokenToKVPoolAllocator(slots, PAGE, torch.float32, "cpu", self.kv, need_sort=False)
        rows = ReqToTokenPool(size=8, max_context_len=slots, device="cpu", enable_memory_saver=False)
        self.params = CacheInitParams(
            disable=False,
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=PAGE,
            tree_components=(ComponentType.FULL,),
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
        self._names = map("request-{}".format, itertools.count())

    def run(
        self,
        prompt: Sequence[int],
        salt: str | None = None,
        extra_key: str | None = None,
        between: Callable[[str], None] = lambda step: None,
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
        slots = torch.cat([held, loaded, self.allocator.alloc(rest)])
        self._fill(prompt, slots, len(held) + len(loaded), salt, extra_key)
        self.cache.insert(InsertParams(key=key, value=slots))
        between("inserted")
        self.settle()
        return len(held), len(loaded)

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
            keys, values = self._layer(layer)  # waits, as a forward does
            for page in range(match.device_prefix_len // PAGE, (match.device_prefix_len + count) // PAGE):
                at = slots[page * PAGE - match.device_prefix_len :][:PAGE]
                expected = _content(prompt[: (page + 1) * PAGE], salt, extra_key)
                right &= bool((keys[at] == expected + layer).all()) and bool((values[at] == expected - layer).all())
        failed = self.cache.finish_external_linker_loads([req])
        between("failed" if failed else "finished")
        if failed:
            self.allocator.free(slots)
            return torch.empty(0, dtype=torch.int64)
        assert right, "a loaded page does not hold what was computed"
        return slots

    def _layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.kv, MLATokenToKVPool):
            both = self.kv.get_key_buffer(layer)
            return both[..., :8], both[..., :8] - 2 * layer
        return self.kv.get_key_buffer(layer), self.kv.get_value_buffer(layer)

    def _fill(self, prompt: Sequence[int], slots: torch.Tensor, first: int, salt: Any, extra_key: Any) -> None:
        for page in range(first // PAGE, len(prompt) // PAGE):
            at = slots[page * PAGE : (page + 1) * PAGE]
            content = _content(prompt[: (page + 1) * PAGE], salt, extra_key)
            for layer in range(LAYERS):
                if isinstance(self.kv, MLATokenToKVPool):
                    self.kv.kv_buffer[layer][at] = content + layer
                else:
                    self.kv.k_buffer[layer][at] = content + layer
                    self.kv.v_buffer[layer][at] = content - layer

    def settle(self) -> None:
        """Until nothing is on its way to FlexKV."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self.cache.linker.pending_offloads:
            self.cache.check_hicache_events()
            assert time.monotonic() < deadline, "an offload does not end"
            time.sleep(0.001)

    def flush(self) -> None:
        """As SGLang's /flush_cache."""
        self.cache.reset()
        self.allocator.clear()
        for buffer in self.linker.pools.values():
            for tensor in buffer.kv_buffer:
                tensor.zero_()

    def evict(self, count: int) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.cache.evict(EvictParams(num_tokens=count))

    def close(self) -> None:
        self.linker.close()


def _content(prefix: Sequence[int], salt: Any, extra_key: Any) -> float:
    digest = hashlib.sha256(repr((list(prefix), salt, extra_key)).encode()).digest()
    return float(int.from_bytes(digest[:2], "little") + 1)
