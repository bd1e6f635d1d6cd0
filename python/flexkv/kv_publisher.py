"""A daemon's KV events on ZeroMQ, as vLLM's publisher sends them: PUB with (topic, sequence number, batch), and a
ROUTER that repeats batches. Unlike vLLM's, it repeats from any number on: in place of what it no longer holds comes one
batch that clears, and then stores all that is kept."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec
import zmq

from flexkv.kv_events import Change, Cleared, Stored, fields_of, low_64_bits, records

_log = logging.getLogger("flexkv.events")

_END = (-1).to_bytes(8, "big", signed=True)
_HELD_BYTES_MAX = 64 << 20
_HIGH_WATER_MARK = 100_000  # batches; what a subscriber does not take is dropped for it, and it sees the gap


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None
    extra_keys: Any = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True):
    block_hashes: list[int]
    medium: str
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    pass


class Batch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


def events_of(changes: Iterable[Change]) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
    events: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
    for record in records(changes):
        if isinstance(record, Cleared):
            events.append(AllBlocksCleared())
        else:
            cls = BlockStored if isinstance(record, Stored) else BlockRemoved
            events.append(cls(**fields_of(record, low_64_bits)))
    return events


class KvEventPublisher:
    """Owns a thread until close(). `changes`: flexkv._core.Changes, the thread's from now on. Raises OSError with the
    endpoint when that cannot be bound."""

    def __init__(self, changes: Any, endpoint: str, replay_endpoint: str, topic: str) -> None:
        self._changes = changes
        self._topic = topic.encode()
        self._context = zmq.Context()
        self._held: deque[tuple[int, bytes]] = deque()
        self._held_bytes = 0
        self._next = 0
        self._stopped, self._stop = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._pub = self._bind(zmq.PUB, endpoint)
            self._replay = self._bind(zmq.ROUTER, replay_endpoint) if replay_endpoint else None
        except OSError:
            self._release()
            raise
        self._thread = threading.Thread(target=self._run, name="flexkv-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.write(self._stop, b"x")
        self._thread.join()
        self._release()

    def _release(self) -> None:
        self._context.destroy(linger=200)
        os.close(self._stopped)
        os.close(self._stop)

    def _bind(self, kind: int, endpoint: str) -> Any:
        socket = self._context.socket(kind)
        socket.set_hwm(_HIGH_WATER_MARK)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise OSError(f"KV events cannot be published at {endpoint}: {zmq.strerror(error.errno or 0)}") from None
        return socket

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._stopped, self._changes, *([self._replay] if self._replay is not None else [])):
            poller.register(source, zmq.POLLIN)
        # Whoever remembers an earlier run of this node is told that it is over.
        self._publish([AllBlocksCleared()])
        while True:
            ready = dict(poller.poll())
            if self._stopped in ready:
                return
            try:
                self._take()
                if self._replay in ready:
                    self._repeat()
            except Exception:
                _log.exception("publishing KV events failed; subscribers see a gap")

    def _take(self) -> None:
        while True:
            if events := events_of(self._changes.take()):
                self._publish(events)
            if not self._changes.more():
                return

    def _publish(self, events: list[Any]) -> None:
        payload = _encode(events)
        seq, self._next = self._next, self._next + 1
        self._held.append((seq, payload))
        self._held_bytes += len(payload)
        while self._held_bytes > _HELD_BYTES_MAX and len(self._held) > 1:
            self._held_bytes -= len(self._held.popleft()[1])
        self._pub.send_multipart((self._topic, seq.to_bytes(8, "big"), payload))

    def _repeat(self) -> None:
        frames = self._replay.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            _log.warning("a request to repeat KV events has %d frames; it should be an 8-byte number", len(frames))
            return
        client, first = frames[0], int.from_bytes(frames[2], "big")
        batches: Iterable[tuple[int, bytes]] = self._held
        if first < self._held[0][0]:
            batches = [(self._next - 1, _encode([AllBlocksCleared(), *events_of(self._changes.told())]))]
        for seq, payload in batches:
            if seq >= first:
                self._replay.send_multipart((client, b"", self._topic, seq.to_bytes(8, "big"), payload))
        self._replay.send_multipart((client, b"", b"", _END, b""))


def _encode(events: list[Any]) -> bytes:
    return msgspec.msgpack.encode(Batch(time.time(), events))
