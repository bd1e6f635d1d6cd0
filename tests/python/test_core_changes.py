"""The changes of a real node, as Python gets them: from saves through a real rank agent, to a reset."""

from __future__ import annotations

import ctypes
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flexkv.kv_events import Details, pack_details

core = pytest.importorskip("flexkv._core")

BLOCKS, BYTES = 8, 4096
DETAILS = [pack_details(Details(None, None, 0, None))]


def hashes(count: int) -> list[bytes]:
    return [bytes([number]) * 32 for number in range(1, count + 1)]


def settled(changes: Any) -> list[Any]:
    """What comes next."""
    assert select.select([changes], [], [], 10)[0]
    found = changes.take()
    while changes.more():
        found += changes.take()
    return found


@contextmanager
def engine_of(tmp_path: Path, node: Any) -> Iterator[Any]:
    """A client of the node, with its rank."""
    memory = ctypes.create_string_buffer(BLOCKS * BYTES)
    address = ctypes.addressof(memory)
    tensor = {"name": "kv", "address": address, "element_bytes": 1, "shape": [BLOCKS, BYTES], "stride": [BYTES, 1]}
    names = {"runtime_dir": str(tmp_path), "node_name": "node", "engine_id": "e", "rank": 0, "rank_count": 1}
    client = core.Client.embedded(node, "e", 1, "model", bytes(32), 2)
    agent = core.RankAgent(names, [tensor], BLOCKS, "host")
    try:
        assert client.served(10)
        yield client
    finally:
        agent.stop()
        client.close()
        node.stop()


def started(tmp_path: Path) -> Any:
    tmp_path.chmod(0o700)
    node = core.Node({"pool_bytes": 1 << 20, "huge_pages": False, "log_level": "error"})
    node.listen(str(tmp_path), "node")
    return node


def save(client: Any) -> Any:
    sequence = client.open_sequence()
    assert client.lookup(sequence, hashes(3))[0] == 0
    client.describe(sequence, 0, hashes(3), [11, 12, 21, 22, 31, 32], DETAILS)
    assert client.save(sequence, hashes(3), 0, [0, 1, 2], True) != 0
    return sequence


def test_saved_blocks_are_told_with_their_description_and_a_reset_clears(tmp_path: Path) -> None:
    node = started(tmp_path)
    changes = node.follow()
    assert settled(changes) == []
    with engine_of(tmp_path, node) as client:
        sequence = save(client)
        added = []
        while len(added) < 3:
            added += settled(changes)
        assert added == [
            ("added", 0, hashes(1)[0], b"", [11, 12], DETAILS[0]),
            ("added", 0, hashes(2)[1], hashes(1)[0], [21, 22], DETAILS[0]),
            ("added", 0, hashes(3)[2], hashes(2)[1], [31, 32], DETAILS[0]),
        ]
        assert changes.told() == added == client.take_changes() == client.told()
        again = client.open_sequence()
        assert client.lookup(again, hashes(3))[0] == 3
        assert client.first_undescribed(again) == 3
        node.reset()
        assert settled(changes) == [("cleared", 0, b"", b"", [], b"")]
        assert {(kind, hash_) for kind, _, hash_, *_ in client.take_changes()} == {("removed", h) for h in hashes(3)}
        with pytest.raises(ValueError, match="do not fit together"):
            client.describe(sequence, 0, hashes(3), [1, 2], DETAILS)


def test_routers_hear_at_once_that_a_node_that_drains_gives_nothing(tmp_path: Path) -> None:
    zmq = pytest.importorskip("zmq")
    msgspec = pytest.importorskip("msgspec")
    from flexkv.kv_publisher import KvEventPublisher

    node = started(tmp_path)
    context = zmq.Context()
    publisher = KvEventPublisher(node.follow(), f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay", "")
    replay = context.socket(zmq.DEALER)
    replay.connect(f"ipc://{tmp_path}/replay")

    def told() -> list[dict[str, Any]]:
        """All events from the beginning."""
        events: list[dict[str, Any]] = []
        replay.send_multipart([b"", (0).to_bytes(8, "big")])
        while True:
            assert replay.poll(60_000)
            _, _, number, payload = replay.recv_multipart()
            if number == (-1).to_bytes(8, "big", signed=True):
                return events
            events += msgspec.msgpack.decode(payload)[1]

    def hashes_kept() -> set[int]:
        """Of a router that has heard all that."""
        kept: set[int] = set()
        for event in told():
            if event["type"] == "AllBlocksCleared":
                kept.clear()
            elif event["type"] == "BlockStored":
                kept |= set(event["block_hashes"])
            else:
                kept -= set(event["block_hashes"])
        return kept

    def wait_for(blocks: int) -> None:
        deadline = time.monotonic() + 120
        while len(hashes_kept()) != blocks:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    try:
        with engine_of(tmp_path, node) as client:
            save(client)
            wait_for(3)
            assert {kind for kind, *_ in client.take_changes()} == {"added"}
            node.drain(60)
            wait_for(0)
            assert told()[-1] == {"type": "AllBlocksCleared"}
            assert {(kind, hash_) for kind, _, hash_, *_ in client.take_changes()} == {
                ("removed", h) for h in hashes(3)
            }
            again = client.open_sequence()
            assert client.lookup(again, hashes(3))[0] == 0, "as it was told"
            client.describe(again, 0, hashes(3), [11, 12, 21, 22, 31, 32], DETAILS)
            assert client.take_changes() == client.told() == []
    finally:
        publisher.close()
        context.destroy(linger=0)
