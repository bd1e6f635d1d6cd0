"""How KV tensors lie in memory: as the caller says it, and as the core wants it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class KVCacheLayoutType(enum.Enum):
    LAYERFIRST = "LAYERFIRST"  # [layer][K, V][block][token][head][dim]
    BLOCKFIRST = "BLOCKFIRST"  # [block][layer][K, V][token][head][dim]


@dataclass
class KVCacheLayout:
    """Counts of one rank's KV cache. `kv_dim`: 2 for keys and values apart, 1 for MLA or packed ones (`is_mla` says the
    same). Where the bytes lie is taken from the tensors themselves; this tells what their axes mean."""

    type: KVCacheLayoutType
    num_layer: int
    num_block: int
    tokens_per_block: int
    num_head: int
    head_size: int
    kv_dim: int | None = None
    num_kv_heads: int | None = None
    layer_groups: Any = None
    tp_size: int = 1
    is_mla: bool | None = None

    def __post_init__(self) -> None:
        if self.layer_groups is not None:
            raise ValueError("layer_groups: caches of several kinds of layers are not supported through this interface")
        if self.kv_dim is None:
            self.kv_dim = 1 if self.is_mla else 2
        elif self.is_mla is not None and self.is_mla != (self.kv_dim == 1):
            raise ValueError(f"is_mla={self.is_mla} and kv_dim={self.kv_dim} contradict each other")
        self.is_mla = self.kv_dim == 1
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_head
        for name in ("num_layer", "num_block", "tokens_per_block", "num_head", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    @property
    def kv_shape(self) -> tuple[int, ...]:
        page = (self.tokens_per_block, self.num_head, self.head_size)
        if self.type is KVCacheLayoutType.LAYERFIRST:
            return (self.num_layer, self._kv_dim, self.num_block, *page)
        return (self.num_block, self.num_layer, self._kv_dim, *page)

    @property
    def _kv_dim(self) -> int:
        assert self.kv_dim is not None
        return self.kv_dim

    def get_chunk_size(self) -> int:
        """Elements of one block in one layer, keys or values."""
        return self.tokens_per_block * self.num_head * self.head_size

    def get_total_elements(self) -> int:
        return self.num_layer * self._kv_dim * self.num_block * self.get_chunk_size()

    def get_block_stride(self) -> int:
        """Elements from a block to the next, in a contiguous tensor of kv_shape."""
        first = self.type is KVCacheLayoutType.BLOCKFIRST
        return self.get_chunk_size() * (self.num_layer * self._kv_dim if first else 1)

    def get_kv_stride(self) -> int:
        """Elements from keys to values."""
        blocks = 1 if self.type is KVCacheLayoutType.BLOCKFIRST else self.num_block
        return self.get_chunk_size() * blocks

    def get_layer_stride(self) -> int:
        return self.get_kv_stride() * self._kv_dim


def describe_tensors(tensors: list[torch.Tensor], layout: KVCacheLayout) -> tuple[list[dict[str, Any]], int, str]:
    """The tensors as addresses, shapes and strides; how many blocks they hold; where they are ("host" or "cuda:N").

    One tensor for all layers, one for each layer, or one for the keys and one for the values of each layer. ValueError:
    a tensor whose blocks cannot be told by its shape."""
    if not tensors:
        raise ValueError("no KV tensors were given")
    counts = {1, layout.num_layer, layout._kv_dim * layout.num_layer}
    if len(tensors) not in counts:
        raise ValueError(
            f"{len(tensors)} KV tensors for {layout.num_layer} layers: expected one of them all, one for each layer, or "
            "keys and values apart"
        )
    places = {_place(tensor) for tensor in tensors}
    if len(places) > 1:
        raise ValueError(f"KV tensors of one rank must be on one device, not on {', '.join(sorted(places))}")
    described = [_describe(number, tensor, layout) for number, tensor in enumerate(tensors)]
    return described, layout.num_block, places.pop()


def _place(tensor: torch.Tensor) -> str:
    return "host" if tensor.device.type == "cpu" else f"{tensor.device.type}:{tensor.device.index or 0}"


def _describe(number: int, tensor: torch.Tensor, layout: KVCacheLayout) -> dict[str, Any]:
    shape, stride = list(tensor.shape), list(tensor.stride())
    blocks, tokens = layout.num_block, layout.tokens_per_block
    if tuple(shape) == layout.kv_shape:
        axes = [2 if layout.type is KVCacheLayoutType.LAYERFIRST else 0]
    else:
        axes = _block_axes(shape, layout)
    if len(axes) > 1:
        raise ValueError(
            f"KV tensor {number} of shape {tuple(shape)}: axes {axes} could all be the {blocks} blocks; use another "
            "number of blocks"
        )
    if axes:
        axis = axes[0]
    elif shape and blocks * tokens <= shape[0] < (blocks + 1) * tokens:
        # An axis of tokens is one of blocks and one of tokens within a block.
        shape[:1], stride[:1] = [blocks, tokens], [tokens * stride[0], stride[0]]
        axis = 0
    else:
        raise ValueError(
            f"KV tensor {number} of shape {tuple(shape)} has neither an axis of {blocks} blocks nor, in front, one of "
            f"{blocks * tokens} tokens ({tokens} a block), as its layout says"
        )
    return {
        "name": f"kv_caches[{number}]",
        "address": tensor.data_ptr(),
        "element_bytes": tensor.element_size(),
        "shape": shape,
        "stride": stride,
        "block_axis": axis,
    }


def _block_axes(shape: list[int], layout: KVCacheLayout) -> list[int]:
    """Axes that can number the blocks: those before the page's own (token, head, dim), which is of as many axes as are
    needed for its elements. Keys and values stacked in front of the blocks look the same as two blocks do."""
    found = []
    for axis, extent in enumerate(shape[:3]):
        inner = 1
        for size in shape[axis + 1 :]:
            inner *= size
        if extent == layout.num_block and inner % layout.get_chunk_size() == 0:
            found.append(axis)
    return found
