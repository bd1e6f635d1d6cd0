"""Checks and conversions of what engines hand over: tokens, masks, slots."""

from __future__ import annotations

from typing import Any

import numpy as np


def token_array(token_ids: Any) -> np.ndarray:
    """1-D int64, contiguous. ValueError: something else."""
    return _integers(token_ids, "token_ids")


def masked_range(token_mask: Any, token_count: int, block_tokens: int) -> tuple[int, int]:
    """First token of the mask, and the one after its last. ValueError: it is not one run that begins with a block."""
    if token_mask is None:
        return 0, token_count
    mask = np.asarray(token_mask)
    if mask.dtype != np.bool_ or mask.shape != (token_count,):
        raise ValueError(
            f"token_mask must be {token_count} booleans, one for each token, not {mask.dtype} of shape {mask.shape}"
        )
    chosen = np.flatnonzero(mask)
    if len(chosen) == 0:
        return 0, 0
    first, end = int(chosen[0]), int(chosen[-1]) + 1
    if end - first != len(chosen):
        raise ValueError(f"token_mask has a gap between tokens {first} and {end}: it must be one run of tokens")
    if first % block_tokens:
        raise ValueError(f"token_mask begins with token {first}, which begins no block of {block_tokens} tokens")
    return first, end


def device_blocks(slot_mapping: Any, token_count: int, block_tokens: int, task: str) -> np.ndarray:
    """The blocks that these token slots fill, in order. ValueError: they are not that many, or no whole blocks."""
    slots = _integers(slot_mapping, f"the slot mapping of {task}")
    if len(slots) != token_count:
        raise ValueError(f"the slot mapping of {task} has {len(slots)} slots for {token_count} tokens")
    pages = slots.reshape(-1, block_tokens)
    firsts = pages[:, 0]
    if len(firsts) == 0:
        return firsts
    if int(slots.min()) < 0 or int(slots.max()) >= block_tokens << 32:
        raise ValueError(f"the slot mapping of {task} holds slots that no tensor has")
    wrong = (firsts % block_tokens != 0) | (pages != firsts[:, None] + np.arange(block_tokens)).any(axis=1)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"the slot mapping of {task} does not consist of whole blocks: tokens {at * block_tokens} to "
            f"{(at + 1) * block_tokens - 1} are in slots {pages[at].tolist()[:4]}..., not in {block_tokens} consecutive "
            f"ones from a multiple of {block_tokens}"
        )
    return firsts // block_tokens


def _integers(values: Any, what: str) -> np.ndarray:
    numpy = getattr(values, "numpy", None)
    if numpy is not None:
        if getattr(getattr(values, "device", None), "type", "cpu") != "cpu":
            raise ValueError(f"{what} must be in host memory, not on {values.device}")
        values = values.numpy()
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{what} must be integers in one dimension, not {array.dtype} of shape {array.shape}")
    return np.ascontiguousarray(array, dtype=np.int64)
