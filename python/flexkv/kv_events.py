"""KV events as vLLM's publisher sends them, made from the changes of what a node keeps. Nothing here needs vLLM.

One block after another of a chain goes into one event, as vLLM does it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

# What events call the tiers; every router that knows tiers knows these.
MEDIA = ("CPU", "DISK")

Change = tuple[str, int, bytes, bytes, list[int], bytes]  # as `flexkv._core.Changes.take` gives it


class Details(msgspec.Struct, array_like=True):
    """What an engine's own events say of a block beside its hash and tokens."""

    lora_id: int | None
    lora_name: str | None
    group_idx: int | None
    extra_keys: Any  # of this block


def pack_details(details: Details) -> bytes:
    return msgspec.msgpack.encode(details)


# One block after another has the same, for the most part.
_unpack_details = functools.lru_cache(maxsize=1)(msgspec.msgpack.Decoder(Details).decode)


@dataclass
class Stored:
    medium: str
    hashes: list[bytes]
    parent: bytes  # empty: none
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    lora_name: str | None
    group_idx: int | None
    extra_keys: list[Any] = field(default_factory=list)  # of each block


@dataclass
class Removed:
    medium: str
    hashes: list[bytes]
    group_idx: int | None


class Cleared:
    pass


Record = Stored | Removed | Cleared


def records(changes: Iterable[Change]) -> Iterator[Record]:
    """In the order of the changes."""
    last: Stored | Removed | None = None
    for kind, tier, hash_, parent, tokens, packed in changes:
        if kind == "cleared":
            if last is not None:
                yield last
            last = None
            yield Cleared()
            continue
        medium, details = MEDIA[tier], _unpack_details(packed)
        if kind == "added":
            if isinstance(last, Stored) and _continues(last, medium, parent, len(tokens), details):
                last.hashes.append(hash_)
                last.token_ids.extend(tokens)
                last.extra_keys.append(details.extra_keys)
                continue
            new = Stored(
                *(medium, [hash_], parent, tokens, len(tokens)),
                *(details.lora_id, details.lora_name, details.group_idx, [details.extra_keys]),
            )
        elif isinstance(last, Removed) and (last.medium, last.group_idx) == (medium, details.group_idx):
            last.hashes.append(hash_)
            continue
        else:
            new = Removed(medium, [hash_], details.group_idx)
        if last is not None:
            yield last
        last = new
    if last is not None:
        yield last


def _continues(stored: Stored, medium: str, parent: bytes, block_size: int, details: Details) -> bool:
    return (
        parent == stored.hashes[-1]
        and (medium, block_size) == (stored.medium, stored.block_size)
        and (details.lora_name, details.group_idx) == (stored.lora_name, stored.group_idx)
    )


def low_64_bits(hash_: bytes) -> int:
    """What vLLM publishes of a hash unless it is told otherwise (VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0)."""
    return int.from_bytes(hash_[-8:], "big")


def fields_of(record: Stored | Removed, name_of: Callable[[bytes], int | bytes]) -> dict[str, Any]:
    """By the names that events give them. `name_of`: what is published of a hash."""
    hashes = [name_of(hash_) for hash_ in record.hashes]
    fields = {"block_hashes": hashes, "medium": record.medium, "group_idx": record.group_idx}
    if isinstance(record, Removed):
        return fields
    extra = record.extra_keys
    return fields | {
        "parent_block_hash": name_of(record.parent) if record.parent else None,
        "token_ids": record.token_ids,
        "block_size": record.block_size,
        "lora_id": record.lora_id,
        "lora_name": record.lora_name,
        "extra_keys": extra if any(keys is not None for keys in extra) else None,
    }
