"""KV memory as engines lay it out, of the sizes that the figures in docs/benchmarks.md are about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Geometry:
    """One model's KV: `planes` runs of `run_bytes` for each block, wherever the engine puts them."""

    name: str
    block_tokens: int
    planes: int
    run_bytes: int

    @property
    def block_bytes(self) -> int:
        return self.planes * self.run_bytes

    def blocks(self, tokens: int) -> int:
        return max(tokens // self.block_tokens, 1)


_MHA_TOKEN = 8 * 128 * 2  # bytes of K, or of V, of one token and layer: 8 heads of 128 values, bfloat16
_MLA_TOKEN = 576 * 2  # bytes of one token and layer: the latent vector and the rotary part

# 64 layers with K and V apart, as a 32B Qwen has them; 61 layers of DeepSeek-V3.
GEOMETRIES = {
    geometry.name: geometry
    for tokens in (16, 64)
    for geometry in (
        Geometry(f"mha{tokens}", tokens, 128, tokens * _MHA_TOKEN),
        Geometry(f"mla{tokens}", tokens, 61, tokens * _MLA_TOKEN),
    )
}

# planes: one allocation, the planes at equal steps. apart: an allocation for each plane, wherever the allocator puts it,
# as engines do. whole: all planes of a block side by side.
LAYOUTS = ("planes", "apart", "whole")


class Memory:
    """KV memory of one geometry and layout on one device."""

    def __init__(self, geometry: Geometry, layout: str, block_count: int, device: torch.device) -> None:
        self.geometry = geometry
        self.layout = layout
        self.block_count = block_count
        shape = (block_count, geometry.run_bytes)
        if layout == "apart":
            self.planes = [torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(geometry.planes)]
        elif layout == "planes":
            self.planes = list(torch.empty((geometry.planes, *shape), dtype=torch.uint8, device=device))
        else:
            whole = torch.empty((block_count, geometry.planes, geometry.run_bytes), dtype=torch.uint8, device=device)
            self.planes = list(whole.unbind(1))

    def describe(self) -> list[dict[str, Any]]:
        """The tensors as a rank agent takes them."""
        return [
            {
                "name": f"plane {number}",
                "address": plane.data_ptr(),
                "element_bytes": 1,
                "shape": list(plane.shape),
                "stride": list(plane.stride()),
            }
            for number, plane in enumerate(self.planes)
        ]

    def fill(self, blocks: list[int], seed: int | None) -> None:
        """Random bytes, or with no seed a constant, into these blocks."""
        index = torch.tensor(blocks, device=self.planes[0].device)
        generator = torch.Generator(device=index.device)
        for number, plane in enumerate(self.planes):
            if seed is None:
                plane[index] = 0xEE
                continue
            generator.manual_seed(seed * 1009 + number)
            words = (len(blocks), self.geometry.run_bytes // 8)
            values = torch.randint(-(2**62), 2**62, words, generator=generator, device=index.device)
            plane[index] = values.view(torch.uint8).view(len(blocks), self.geometry.run_bytes)

    def equal(self, blocks: list[int], others: list[int]) -> bool:
        device = self.planes[0].device
        one, other = torch.tensor(blocks, device=device), torch.tensor(others, device=device)
        return all(torch.equal(plane[one], plane[other]) for plane in self.planes)
