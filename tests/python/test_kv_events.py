"""Events as routers get them, and the publisher of a daemon, over real sockets."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_core
import msgspec
import pytest
import zmq
from flexkv import kv_publisher
from flexkv.cli.app import app
from flexkv.kv_events import Details, pack_details
from flexkv.kv_publisher import KvEventPublisher, events_of
from typer.testing import CliRunner

END = (-1).to_bytes(8, "big", signed=True)
PLAIN = pack_details(Details(None, None, 0, None))


def name(number: int) -> bytes:
    return bytes(24) + number.to_bytes(8, "big")


def added(number: int, parent: int = 0, tier: int = 0, details: bytes = PLAIN) -> tuple[Any, ...]:
    return "added", tier, name(number), name(parent) if parent else b"", [number, number + 1], details


def removed(number: int, tier: int = 0) -> tuple[Any, ...]:
    return "removed", tier, name(number), b"", [], PLAIN


CLEARED = ("cleared", 0, b"", b"", [], b"")


def on_the_wire(changes: list[Any]) -> list[dict[str, Any]]:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(events_of(changes)))


def test_blocks_in_a_row_are_one_event() -> None:
    (event,) = on_the_wire([added(1), added(2, 1), added(3, 2)])
    assert event == {
        "type": "BlockStored",
        "block_hashes": [1, 2, 3],
        "parent_block_hash": None,
        "token_ids": [1, 2, 2, 3, 3, 4],
        "block_size": 2,
        "lora_id": None,
        "medium": "CPU",
        "lora_name": None,
        "group_idx": 0,
    }


@pytest.mark.parametrize(
    "second",
    [
        added(2, 5),  # another chain
        added(2, 1, tier=1),
        added(2, 1, details=pack_details(Details(7, "adapter", 0, ["adapter"]))),
        added(2, 1, details=pack_details(Details(None, None, 1, None))),
    ],
)
def test_what_differs_is_another_event(second: Any) -> None:
    first, other = on_the_wire([added(1), second])
    assert (first["block_hashes"], other["block_hashes"]) == ([1], [2])


def test_extra_keys_and_adapter_are_told() -> None:
    details = pack_details(Details(7, "adapter", 0, ["adapter", ["image", 3]]))
    first, second = on_the_wire([added(1), added(2, 1, details=details)])
    assert "extra_keys" not in first
    assert second["extra_keys"] == [["adapter", ["image", 3]]]
    assert (second["lora_id"], second["lora_name"]) == (7, "adapter")


def test_order_is_kept_and_removals_are_joined_by_medium() -> None:
    events = on_the_wire([removed(1), removed(2), removed(3, tier=1), added(1), CLEARED, added(1)])
    assert [(event["type"], event.get("medium"), event.get("block_hashes")) for event in events] == [
        ("BlockRemoved", "CPU", [1, 2]),
        ("BlockRemoved", "DISK", [3]),
        ("BlockStored", "CPU", [1]),
        ("AllBlocksCleared", None, None),
        ("BlockStored", "CPU", [1]),
    ]


class Script:
    """In place of the core's Changes: says what the test says."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self._lock = threading.Lock()
        self._waiting: list[Any] = []
        self.kept: list[Any] = []

    def say(self, *changes: Any) -> None:
        with self._lock:
            self._waiting.append(list(changes))
            os.write(self._writer, b"x")

    def fileno(self) -> int:
        return self._reader

    def take(self) -> list[Any]:
        with self._lock:
            if not self._waiting:
                return []
            os.read(self._reader, 1)
            return self._waiting.pop(0)

    def more(self) -> bool:
        return bool(self._waiting)

    def told(self) -> list[Any]:
        return self.kept


class Subscriber:
    def __init__(self, directory: Path) -> None:
        self._context = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.subscribe(b"topic")
        self._sub.connect(f"ipc://{directory}/events")
        self._replay = self._context.socket(zmq.DEALER)
        self._replay.connect(f"ipc://{directory}/replay")

    def hears(self) -> bool:
        return bool(self._sub.poll(100))

    def hear(self) -> tuple[int, list[Any]]:
        assert self._sub.poll(10_000)
        topic, seq, payload = self._sub.recv_multipart()
        assert topic == b"topic"
        return int.from_bytes(seq, "big"), msgspec.msgpack.decode(payload)[1]

    def repeat(self, first: int) -> list[tuple[int, list[Any]]]:
        self._replay.send_multipart([b"", first.to_bytes(8, "big")])
        batches = []
        while True:
            assert self._replay.poll(10_000)
            _, _, seq, payload = self._replay.recv_multipart()
            if seq == END:
                return batches
            batches.append((int.from_bytes(seq, "big"), msgspec.msgpack.decode(payload)[1]))

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def subscriber(script: Script, tmp_path: Path) -> Iterator[Subscriber]:
    started = Subscriber(tmp_path)
    publisher = KvEventPublisher(script, f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay", "topic")
    yield started
    publisher.close()
    started.close()


def connected(script: Script, subscriber: Subscriber) -> None:
    """Returns when the subscriber hears what is published, and has heard it."""
    number = 100
    script.say(removed(number))
    while not subscriber.hears():
        number += 1
        script.say(removed(number))
    while subscriber.hear()[1][0].get("block_hashes") != [number]:
        pass


def test_batches_are_numbered_and_repeated_from_any_number(script: Script, subscriber: Subscriber) -> None:
    connected(script, subscriber)
    script.say(added(1))
    first, events = subscriber.hear()
    script.say(added(2, 1))
    assert subscriber.hear()[0] == first + 1
    everything = subscriber.repeat(0)
    assert [seq for seq, _ in everything] == list(range(first + 2))
    assert everything[0][1] == [{"type": "AllBlocksCleared"}]
    assert everything[first] == (first, events)
    assert subscriber.repeat(first) == everything[first:]
    assert subscriber.repeat(first + 2) == []


def test_a_late_subscriber_gets_what_is_kept_for_what_is_no_longer_held(
    script: Script, subscriber: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_publisher, "_HELD_BYTES_MAX", 1)
    connected(script, subscriber)
    script.kept = [added(1), added(2, 1)]
    (batch,) = subscriber.repeat(0)
    assert [event["type"] for event in batch[1]] == ["AllBlocksCleared", "BlockStored"]
    assert batch[1][1]["block_hashes"] == [1, 2]
    script.say(added(3, 2))
    assert subscriber.hear()[0] == batch[0] + 1


def test_an_endpoint_in_use_is_told(script: Script) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        endpoint = "tcp://127.0.0.1:{}".format(other.getsockname()[1])
        with pytest.raises(OSError, match=f"cannot be published at {endpoint}: Address already in use$"):
            KvEventPublisher(script, endpoint, "", "")


@pytest.mark.usefixtures("clean_environment")
def test_a_daemon_serves_without_an_endpoint_that_is_in_use(
    script: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "flexkv._core", fake_core)
    monkeypatch.setattr(fake_core.Node, "wait", lambda self, stop_fd: None)
    monkeypatch.setattr(fake_core.Node, "follow", lambda self: script, raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        endpoint = "tcp://127.0.0.1:{}".format(other.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "--cpu-cache", "1", "--events", endpoint])
    assert result.exit_code == 0, result.output
    assert "KV events OFF, pid" in result.output
    assert any(f"at {endpoint}: Address already in use; no KV events: give another" in text for text in caplog.messages)
