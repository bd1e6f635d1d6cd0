"""What the prompts of the soak are, and which bytes their blocks must have."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

LAYERS = 4
RUN_BYTES = 16 << 10
BLOCK_BYTES = LAYERS * RUN_BYTES
BLOCK_TOKENS = 16

_WORDS = RUN_BYTES // 8
# No word of a block equals another, so a layer or a run in the wrong place is seen as well as a wrong block.
_BASE = np.random.default_rng(7).integers(0, 2**64, size=(LAYERS, _WORDS), dtype=np.uint64)
_RANK = 0x9E3779B97F4A7C15
_NOTHING = np.uint64(0xEEEEEEEEEEEEEEEE)

_BEGINNINGS = 6  # system prompts, each the beginning of every sixth conversation
_BEGINNING_BLOCKS = 6
_BLOCKS_MAX = 40
_NEW_PER_SECOND = 15  # conversations that begin, so that old blocks have to go
_LIVE_SECONDS = 60.0


@dataclass(frozen=True)
class Prompt:
    hashes: list[bytes]
    keys: list[int]  # which bytes each block has
    private: bool


def _prompt(names: list[str], version: str, private: bool) -> Prompt:
    hashes = [hashlib.blake2b(name.encode(), digest_size=32).digest() for name in names]
    keys = [
        int.from_bytes(hashlib.blake2b(one, key=version.encode(), digest_size=8).digest(), "little") for one in hashes
    ]
    return Prompt(hashes, keys, private)


def shared_prompt(draw: random.Random, space: str, now: float) -> Prompt:
    """Of conversations that all engines of a model have: what one saves, the others load."""
    age = min(draw.expovariate(3 / _LIVE_SECONDS), 3 * _LIVE_SECONDS)
    number = int((now - age) * _NEW_PER_SECOND)
    count = draw.randint(2, _BLOCKS_MAX)
    beginning = number % _BEGINNINGS
    names = [
        f"{space} beginning {beginning} {block}" if block < _BEGINNING_BLOCKS else f"{space} {number} {block}"
        for block in range(count)
    ]
    return _prompt(names, "", False)


def private_prompt(draw: random.Random, owner: str, version: int) -> Prompt:
    """Of conversations that nobody else has. Another version has the same hashes and other bytes, as after an update of
    the weights: after a reset only those may be found."""
    number = draw.randrange(24)
    names = [f"{owner} {number} {block}" for block in range(draw.randint(2, 24))]
    return _prompt(names, str(version), True)


class Memory:
    """The device memory of one rank."""

    def __init__(self, rank: int, block_count: int) -> None:
        self.block_count = block_count
        self._mask = np.uint64(rank * _RANK & (2**64 - 1))
        self._words = np.zeros((LAYERS, block_count, _WORDS), dtype=np.uint64)

    def describe(self) -> list[dict[str, Any]]:
        """The tensors as a rank agent takes them."""
        return [
            {
                "name": f"layer {number}",
                "address": layer.ctypes.data,
                "element_bytes": 8,
                "shape": list(layer.shape),
                "stride": [step // 8 for step in layer.strides],
            }
            for number, layer in enumerate(self._words)
        ]

    def fill(self, block: int, key: int) -> None:
        np.bitwise_xor(_BASE, np.uint64(key) ^ self._mask, out=self._words[:, block])

    def forget(self, block: int) -> None:
        self._words[:, block] = _NOTHING

    def layer_is(self, layer: int, block: int, key: int) -> bool:
        return bool(np.array_equal(self._words[layer, block], _BASE[layer] ^ (np.uint64(key) ^ self._mask)))

    def differs(self, block: int, key: int) -> str:
        """How the block differs from what it must be; empty if it does not."""
        found = self._words[:, block] ^ (_BASE ^ (np.uint64(key) ^ self._mask))
        wrong = np.flatnonzero(found)
        if wrong.size == 0:
            return ""
        layer, word = divmod(int(wrong[0]), _WORDS)
        other = found.reshape(-1)[wrong]
        kind = "never filled" if (self._words[:, block].reshape(-1)[wrong] == _NOTHING).all() else "other bytes"
        if wrong.size == found.size and (other == other[0]).all():
            kind = "all bytes of another block"
        return f"{wrong.size} of {found.size} words from layer {layer} word {word}: {kind}"
