"""A router's view of one engine's or daemon's caches, from its KV events alone.

`kv_replica.py REPLAY_ENDPOINT OUT`: asks the publisher for all that it has published, and the node in
FLEXKV_RUNTIME_DIR for its status, until both agree or 10 seconds are over, and writes what both say to OUT as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import zmq

Block = tuple[Any, int]
_END = (-1).to_bytes(8, "big", signed=True)


class Replica:
    """Fails on what routers cannot use: events that do not describe themselves, gaps, and needless removals."""

    def __init__(self) -> None:
        self.next = 0
        # By medium; a block is known by its KV group and its hash, as groups share hashes.
        self.blocks: dict[str, set[Block]] = defaultdict(set)
        self.told: dict[str, dict[Block, Any]] = defaultdict(dict)  # what was said of each
        self.ranks: set[Any] = set()  # those that batches name
        self.windowed: set[int] = set()  # groups of which vLLM does not tell all blocks
        self.cleared = 0

    def apply(self, seq: int, batch: list[Any]) -> None:
        assert seq == self.next, f"batch {seq} after {self.next - 1}"
        self.next += 1
        self.ranks.add(batch[2] if len(batch) > 2 else None)
        # Whoever clears all media with the engine's is told again what is kept.
        self.forgiving = any(event["type"] == "AllBlocksCleared" for event in batch[1])
        for event in batch[1]:
            match event["type"]:
                case "BlockStored":
                    self._store(event)
                case "BlockRemoved":
                    self._remove(event)
                case "AllBlocksCleared":
                    self.cleared += 1
                    self.blocks.clear()
                case other:
                    raise AssertionError(f"unknown event {other}")

    def _store(self, event: dict[str, Any]) -> None:
        hashes, size = event["block_hashes"], event["block_size"]
        if event["medium"] == "GPU" and len(event["token_ids"]) != size * len(hashes):
            # vLLM's own, of a group with a window: it leaves out the hashes of blocks that the window has passed.
            self.windowed.add(event["group_idx"])
            return
        assert len(event["token_ids"]) == size * len(hashes) > 0, event
        parent = event["parent_block_hash"]
        for i, hash_ in enumerate(hashes):
            assert isinstance(hash_, int)
            extra = (event.get("extra_keys") or [None] * len(hashes))[i]
            what = (parent, event["token_ids"][i * size : (i + 1) * size], event.get("lora_name"), extra)
            block = (event.get("group_idx"), hash_)
            known = self.told[event["medium"]].setdefault(block, what)
            assert known == what, f"block {block} was {known}, is {what}"
            if event["medium"] != "GPU":
                assert block not in self.blocks[event["medium"]], f"stored twice: {block}"
            self.blocks[event["medium"]].add(block)
            parent = hash_

    def _remove(self, event: dict[str, Any]) -> None:
        here = self.blocks[event["medium"]]
        for hash_ in event["block_hashes"]:
            block = (event.get("group_idx"), hash_)
            assert event["medium"] == "GPU" or self.forgiving or block in here, f"removed, and was not there: {block}"
            here.discard(block)


def replay(endpoint: str, first: int = 0) -> list[tuple[int, Any]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(endpoint)
        socket.send_multipart([b"", first.to_bytes(8, "big")])
        batches = []
        while socket.poll(10_000):
            _, _, seq, payload = socket.recv_multipart()
            if seq == _END:
                return batches
            batches.append((int.from_bytes(seq, "big"), msgspec.msgpack.decode(payload)))
        raise AssertionError(f"{endpoint} does not answer")


def _status(socket: str) -> dict[str, int]:
    from flexkv import _core

    spaces = json.loads(_core.query_status(socket))["spaces"]
    # Slots of saves that run are in use and hold no block yet.
    return {
        "CPU": sum(space["used"] - space["reserved"] for space in spaces),
        "DISK": sum(space.get("disk_used", 0) for space in spaces),
    }


def main(endpoint: str, out: str) -> None:
    deadline = time.monotonic() + 10
    while True:
        replica = Replica()
        for seq, batch in replay(endpoint):
            replica.apply(seq, batch)
        (socket,) = Path(os.environ["FLEXKV_RUNTIME_DIR"]).glob("*.sock")
        node = _status(str(socket))
        seen = {medium: len(replica.blocks[medium]) for medium in node}
        if seen == node or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    gpu = replica.told["GPU"]
    kept = [known for medium in node for known in replica.told[medium].items()]
    alike = all(gpu.get(block) == what for block, what in kept if block in gpu or block[0] not in replica.windowed)
    loras = {what[2] for what in replica.told["CPU"].values()}
    result = {
        "node": node,
        "replica": seen,
        "as_on_gpu": alike,
        "cleared": replica.cleared,
        "ranks": sorted(map(str, replica.ranks)),
        "groups": sorted({str(group) for group, _ in replica.told["CPU"]}),
        "loras": sorted(map(str, loras)),
        "ever": {medium: len(replica.told[medium]) for medium in ("GPU", *node)},
    }
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
