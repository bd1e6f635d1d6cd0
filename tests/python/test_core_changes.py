"""The changes of a real node, as Python gets them: from saves through a real rank agent, to a reset."""

from __future__ import annotations

import ctypes
import select
from pathlib import Path
from typing import Any

import pytest

core = pytest.importorskip("flexkv._core")

BLOCKS, BYTES = 8, 4096


def hashes(count: int) -> list[bytes]:
    return [bytes([number]) * 32 for number in range(1, count + 1)]


def settled(changes: Any) -> list[Any]:
    """What comes next."""
    assert select.select([changes], [], [], 10)[0]
    found = changes.take()
    while changes.more():
        found += changes.take()
    return found


def test_saved_blocks_are_told_with_their_description_and_a_reset_clears(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    node = core.Node({"pool_bytes": 1 << 20, "huge_pages": False, "log_level": "error"})
    node.listen(str(tmp_path), "node")
    changes = node.follow()
    assert settled(changes) == []
    memory = ctypes.create_string_buffer(BLOCKS * BYTES)
    address = ctypes.addressof(memory)
    tensor = {"name": "kv", "address": address, "element_bytes": 1, "shape": [BLOCKS, BYTES], "stride": [BYTES, 1]}
    names = {"runtime_dir": str(tmp_path), "node_name": "node", "engine_id": "e", "rank": 0, "rank_count": 1}
    client = core.Client.embedded(node, "e", 1, "model", bytes(32), 2)
    agent = core.RankAgent(names, [tensor], BLOCKS, "host")
    try:
        assert client.served(10)
        sequence = client.open_sequence()
        assert client.lookup(sequence, hashes(3))[0] == 0
        client.describe(sequence, 0, hashes(3), [11, 12, 21, 22, 31, 32], [b"details"])
        assert client.save(sequence, hashes(3), 0, [0, 1, 2], True) != 0
        added = []
        while len(added) < 3:
            added += settled(changes)
        assert added == [
            ("added", 0, hashes(1)[0], b"", [11, 12], b"details"),
            ("added", 0, hashes(2)[1], hashes(1)[0], [21, 22], b"details"),
            ("added", 0, hashes(3)[2], hashes(2)[1], [31, 32], b"details"),
        ]
        assert changes.told() == added == client.take_changes() == client.told()
        again = client.open_sequence()
        assert client.lookup(again, hashes(3))[0] == 3
        assert client.first_undescribed(again) == 3
        node.reset()
        assert settled(changes) == [("cleared", 0, b"", b"", [], b"")]
        assert {(kind, hash_) for kind, _, hash_, *_ in client.take_changes()} == {("removed", h) for h in hashes(3)}
        with pytest.raises(ValueError, match="do not fit together"):
            client.describe(sequence, 0, hashes(3), [1, 2], [b"details"])
    finally:
        agent.stop()
        client.close()
        node.stop()
