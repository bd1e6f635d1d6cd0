"""Damage to the SSD tier's files, as a drive may do it. The files are described in docs/formats/disk.md."""

from __future__ import annotations

from pathlib import Path

_HEADER_BYTES = 4096
_RECORD_BYTES = 64


def damage_block(directory: Path, position: int) -> None:
    """Flips a bit in the middle of a block, which is number `position` of the only chain in the only directory."""
    (records,) = directory.glob("*.records")
    data = records.read_bytes()
    slot_bytes = int.from_bytes(data[24:32], "little")
    children = {}  # by the key before: slot and key
    for slot in range((len(data) - _HEADER_BYTES) // _RECORD_BYTES):
        record = data[_HEADER_BYTES + slot * _RECORD_BYTES :][:_RECORD_BYTES]
        if any(record):
            children[record[16:32]] = (slot, record[:16])
    slot, key = children[bytes(16)]
    for _ in range(position):
        slot, key = children[key]
    with records.with_suffix(".blocks").open("r+b") as blocks:
        at = slot * slot_bytes + slot_bytes // 2
        blocks.seek(at)
        (byte,) = blocks.read(1)
        blocks.seek(at)
        blocks.write(bytes([byte ^ 1]))
