"""How fast our copies are between GPU and host memory, beside a plain copy in the same run. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TOKENS = 4096

# What engines make of a block: its planes in allocations of their own, and for comparison all of it in one piece. Short
# runs both ways that loads can take: where they lie, and through a buffer on the GPU (gpu_stage_below_kb).
_IN_PLACE = 0
_STAGED = 1 << 20
CASES = (
    ("runs of 18 KiB (MLA)", "mla16", "apart", _IN_PLACE),
    ("the same, loads through a buffer", "mla16", "apart", _STAGED),
    ("runs of 32 KiB", "mha16", "apart", _IN_PLACE),
    ("the same, loads through a buffer", "mha16", "apart", _STAGED),
    ("runs of 128 KiB", "mha64", "apart", _IN_PLACE),
    ("the same, loads through a buffer", "mha64", "apart", _STAGED),
    ("whole blocks of 4 MiB", "mha16", "whole", _IN_PLACE),
)
STEPS = 1 + len(CASES)


@dataclass(frozen=True)
class CopyRate:
    """Bytes per second. The link itself has no ratio."""

    what: str
    to_host: float
    to_device: float
    of_link_to_host: float | None = None
    of_link_to_device: float | None = None
    equal: bool = True  # what came back is what went


def measure_copies(device: torch.device, tokens: int, done: Callable[[str], None]) -> Iterator[CopyRate]:
    """The link first, then copies of so many tokens. `done` hears of each step. RuntimeError: too little memory."""
    from flexkv.bench.transfer import measure_alone, measure_link

    link = measure_link(device)
    yield CopyRate("the link: plain copies of 256 MiB", link.to_host, link.to_device)
    done("the link")
    for what, geometry, layout, stage_below in CASES:
        for row in measure_alone(device, [geometry], [layout], [tokens], stage_below, lambda _: None):
            to_host, to_device = row.bytes / row.save_seconds, row.bytes / row.load_seconds
            yield CopyRate(what, to_host, to_device, to_host / link.to_host, to_device / link.to_device, row.equal)
        done(what)
