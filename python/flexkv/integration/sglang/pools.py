"""SGLang's device pools as the core wants them: which tensors hold a page, and which layers read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexkv.manager.slots import device_blocks


@dataclass(frozen=True)
class Pool:
    """Tensors whose blocks are numbered alike. `block_slots`: of SGLang's indices, so many make a block. `layers[i]`:
    the first layer of the forward, counted from the stage's first, that reads tensor i."""

    name: str
    block_slots: int
    block_count: int
    device: str
    tensors: list[dict[str, Any]]
    layers: list[int]


@dataclass(frozen=True)
class Pools:
    """`entries`: SGLang's, by name. `replicated`: all tensor-parallel ranks hold the same bytes."""

    pools: list[Pool]
    entries: Mapping[Any, Any]
    num_layers: int
    replicated: bool


def device_pools(params: Any, components: set[Any]) -> Pools:
    """ValueError: pools that this door cannot keep."""
    kvcache = params.token_to_kv_pool_allocator.get_kvcache()
    entries, num_layers, replicated = _entries(kvcache, params, components)
    by_source: dict[Any, list[Any]] = {}
    for entry in entries:
        if entry.translate_indices(probe := torch.arange(entry.page_size)) is not probe:
            raise ValueError(f"the FlexKV linker cannot keep pool '{entry.name}': its pages are numbered by themselves")
        by_source.setdefault(entry.indices_from_pool, []).append(entry)
    pools = [_pool(str(source), of_source) for source, of_source in by_source.items()]
    return Pools(pools, {entry.name: entry for entry in entries}, num_layers, replicated)


def _entries(kvcache: Any, params: Any, components: set[Any]) -> tuple[list[Any], int, bool]:
    from sglang.srt.mem_cache.hicache_storage import PoolName
    from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import resolve_hybrid_device_pool_group
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool, MLATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    page = params.page_size
    plain = (MHATokenToKVPool, MLATokenToKVPool)
    names = {component.name for component in components}
    if type(kvcache) in plain and names == {"FULL"}:
        _refuse_drafts(params)
        layers = {layer: layer for layer in range(kvcache.layer_num)}
        return [_entry(PoolName.KV, kvcache, layers, page)], kvcache.layer_num, type(kvcache) is MLATokenToKVPool
    if type(kvcache) is SWAKVPool and names == {"FULL", "SWA"}:
        _refuse_drafts(params)
        entries = []
        for name, pool, swa in ((PoolName.KV, kvcache.full_kv_pool, False), (PoolName.SWA, kvcache.swa_kv_pool, True)):
            if type(pool) is not MHATokenToKVPool:
                raise ValueError(f"the FlexKV linker cannot keep a {type(pool).__name__} with sliding windows")
            mapped = kvcache.layers_mapping.items()
            layers = {layer - kvcache.start_layer: index for layer, (index, is_swa) in mapped if is_swa == swa}
            entries.append(_entry(name, pool, layers, page))
        return entries, kvcache.layer_num, False
    if type(kvcache) is HybridLinearKVPool and names == {"FULL", "MAMBA"}:
        # SGLang describes those with latents only.
        if type(kvcache.full_kv_pool) is MHATokenToKVPool:
            return _with_states(kvcache, params)
    # The other models, as far as SGLang can describe their pools itself.
    group = resolve_hybrid_device_pool_group(kvcache=kvcache, page_size=page, params=params, components=components)
    return group.entries, group.num_layers, group.rank_replicated


def _with_states(kvcache: Any, params: Any) -> tuple[list[Any], int, bool]:
    from sglang.srt.mem_cache.hicache_storage import PoolName
    from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import _mamba_device_pool_entry
    from sglang.srt.runtime_context import get_parallel

    _refuse_drafts(params)
    if get_parallel().attn_dcp_size > 1:
        raise ValueError("the FlexKV linker: states together with decode context parallelism are not supported")
    mapped = kvcache.full_attention_layer_id_mapping.items()
    layers = {layer - kvcache.start_layer: index for layer, index in mapped}
    entries = [
        _entry(PoolName.KV, kvcache.full_kv_pool, layers, params.page_size),
        _mamba_device_pool_entry(params.req_to_token_pool, kvcache.start_layer),
    ]
    return entries, max(layer for entry in entries for layer in entry.layer_mapping) + 1, False


def _refuse_drafts(params: Any) -> None:
    if params.mtp_draft_device_pools or params.sidecar_draft_device_pools:
        raise ValueError(
            "the FlexKV linker cannot keep the KV of this model's draft: start SGLang without speculative decoding"
        )


def _entry(name: Any, pool: Any, layers: dict[int, int], page: int) -> Any:
    from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import DevicePoolEntry

    kv = getattr(pool, "kv_buffer", None) if not hasattr(pool, "k_buffer") else None
    if kv is None and (pool.k_scale_buffer is not None or pool.native_k_scale_buffer is not None):
        raise ValueError("the FlexKV linker cannot keep KV with scales: start SGLang with another --kv-cache-dtype")
    components = [pool.k_buffer, pool.v_buffer] if kv is None else [kv]
    return DevicePoolEntry(
        name=name,
        indices_from_pool=name,
        device_pool=pool,
        components=components,
        layer_mapping=layers,
        page_size=page,
        rows_are_pages=False,
    )


def _pool(source: str, entries: Sequence[Any]) -> Pool:
    found = sorted(_tensors(entries), key=lambda item: item[0])
    tensors = [_describe(f"{source}[{number}]", tensor, 0, span) for number, (_, tensor, span) in enumerate(found)]
    count = min(tensor["shape"][0] for tensor in tensors)
    for tensor in tensors:
        tensor["shape"][0] = count
    places = {tensor.device for _, tensor, _ in found}
    if len(places) > 1:
        raise ValueError(f"pool '{source}' is on several devices: {', '.join(sorted(map(str, places)))}")
    device = places.pop()
    where = "host" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
    return Pool(source, entries[0].page_size, count, where, tensors, [layer for layer, _, _ in found])


def _tensors(entries: Iterable[Any]) -> Iterable[tuple[int, torch.Tensor, int]]:
    """(layer, tensor, its rows that make a block), each tensor once: of the first layer that reads it."""
    seen = set()
    for entry in entries:
        for layer in sorted(entry.layer_mapping):
            mapped = entry.layer_mapping[layer]
            for index in [mapped] if isinstance(mapped, int) else mapped:
                for component, meta in zip(entry.components, entry.buffer_meta, strict=True):
                    tensor = component[index]
                    address, _, block_bytes = meta[index]
                    if address not in seen:
                        seen.add(address)
                        yield layer, tensor, block_bytes // (tensor.nbytes // tensor.shape[0])


def _describe(name: str, tensor: torch.Tensor, axis: int, span: int) -> dict[str, Any]:
    """`span` rows of the axis make a block."""
    shape, stride = list(tensor.shape), list(tensor.stride())
    blocks = shape[axis] // span
    if span > 1:
        shape[axis : axis + 1], stride[axis : axis + 1] = [blocks, span], [span * stride[axis], stride[axis]]
    return {
        "name": name,
        "address": tensor.data_ptr(),
        "element_bytes": tensor.element_size(),
        "shape": shape,
        "stride": stride,
        "block_axis": axis,
    }


# Layouts of HiCache's host pools: the axis of the pages, and whether it counts their tokens.
_HOST_LAYOUTS = {"layer_first": (1, True), "page_first": (0, True), "page_first_direct": (0, False)}


def host_pool(pool: Any) -> Pool:
    """HiCache's own host memory, as a pool. ValueError: a kind of pool that cannot be kept."""
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    if type(pool) not in (MHATokenToKVPoolHost, MLATokenToKVPoolHost) or pool.layout not in _HOST_LAYOUTS:
        raise ValueError(
            f"FlexKV cannot keep a {type(pool).__name__} of layout {pool.layout}: models with full attention (MHA, MLA) "
            f"and --hicache-mem-layout {', '.join(_HOST_LAYOUTS)} are supported"
        )
    axis, by_token = _HOST_LAYOUTS[pool.layout]
    span = pool.page_size if by_token else 1
    buffers = [pool.kv_buffer] if type(pool) is MLATokenToKVPoolHost else [pool.k_buffer, pool.v_buffer]
    tensors = [_describe(f"host[{number}]", buffer, axis, span) for number, buffer in enumerate(buffers)]
    return Pool("kv", pool.page_size, pool.page_num, "host", tensors, [0] * len(tensors))


def block_numbers(indices: torch.Tensor, pool: Pool) -> list[int]:
    """Of the blocks that these indices fill, in order. ValueError: they are no whole blocks."""
    slots = indices.detach().to("cpu", torch.int64).flatten()
    return device_blocks(
        slots, slots.numel() // pool.block_slots * pool.block_slots, pool.block_slots, pool.name
    ).tolist()
