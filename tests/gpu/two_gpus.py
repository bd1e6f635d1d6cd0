"""Two ranks on two GPUs of one host: shards of their own (tensor parallel), and one shard that both hold alike (MLA).

usage: two_gpus.py [--tokens N]
Every byte is checked: random patterns are saved, loaded into poisoned blocks of both GPUs and compared. Prints one RESULT
line for each case, beside plain copies of both GPUs at once in the same run. Exit code 1 if a byte differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flexkv import _core
from flexkv.bench.geometry import GEOMETRIES, Memory

RANKS = 2
LINK_BYTES = 1 << 30


def devices() -> list[torch.device]:
    return [torch.device(f"cuda:{rank}") for rank in range(RANKS)]


def synchronize() -> None:
    for device in devices():
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], None], turns: int = 3) -> float:
    work()
    taken = []
    for _ in range(turns):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def plain_copies(to_device: bool) -> float:
    """Bytes per second of both links at once."""
    on_device = [torch.empty(LINK_BYTES, dtype=torch.uint8, device=device) for device in devices()]
    pinned = [torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in devices()]
    pairs = list(zip(on_device, pinned, strict=True) if to_device else zip(pinned, on_device, strict=True))

    def copy() -> None:
        for to, source in pairs:
            to.copy_(source, non_blocking=True)

    return RANKS * LINK_BYTES / seconds_of(copy)


class Engine:
    """A scheduler's client and a rank agent for each GPU, with a node of their own."""

    def __init__(self, memories: list[Memory], pool_bytes: int, alike: bool, stack: contextlib.ExitStack) -> None:
        self._hashes = 0
        runtime = stack.enter_context(tempfile.TemporaryDirectory(prefix="flexkv-two-"))
        self.node = _core.Node({"pool_bytes": pool_bytes, "mode": "embedded", "log_level": "error"})
        self.node.listen(runtime, "two")
        stack.callback(self.node.stop)
        self.agents = []
        for rank, memory in enumerate(memories):
            options: dict[str, Any] = {"runtime_dir": runtime, "node_name": "two", "engine_id": "two", "log_level": "error"}
            options |= {"rank": rank, "rank_count": RANKS, "shard": 0 if alike else rank}
            agent = _core.RankAgent(options, memory.describe(), memory.block_count, f"cuda:{rank}")
            stack.callback(agent.stop)
            self.agents.append(agent)
        self.client = _core.Client.embedded(self.node, "two", RANKS, "two", bytes(32), 16)
        stack.callback(self.client.close)
        deadline = time.monotonic() + 90
        while not (self.client.ready() and all(agent.counters()["pool_registered"] for agent in self.agents)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not ready: {[agent.counters() for agent in self.agents]}")
            time.sleep(0.01)

    def new_hashes(self, count: int) -> list[bytes]:
        self._hashes += count
        return [number.to_bytes(32, "little") for number in range(self._hashes - count + 1, self._hashes + 1)]

    @contextlib.contextmanager
    def sequence(self) -> Iterator[int]:
        sequence = self.client.open_sequence()
        try:
            yield sequence
        finally:
            self.client.close_sequence(sequence)

    def save(self, sequence: int, hashes: list[bytes], blocks: list[int]) -> None:
        job = self.client.save(sequence, hashes, 0, blocks)
        for rank, agent in enumerate(self.agents):
            with torch.cuda.device(rank):
                agent.arm_saves([job], torch.cuda.current_stream().cuda_stream)
        ended: dict[int, str] = {}
        deadline = time.monotonic() + 60
        while job not in ended:
            ended.update(self.client.take_ended_jobs())
            if time.monotonic() > deadline:
                raise RuntimeError("a save did not end")
        if ended[job]:
            raise RuntimeError(f"a save failed: {ended[job]}")

    def load(self, sequence: int, hashes: list[bytes], blocks: list[int]) -> None:
        matched, reason, _ = self.client.lookup(sequence, hashes)
        if matched < len(blocks):
            raise RuntimeError(f"{matched} of {len(blocks)} blocks found: {reason}")
        job = self.client.load(sequence, 0, blocks)
        for rank, agent in enumerate(self.agents):
            with torch.cuda.device(rank):
                agent.arm_loads([job], torch.cuda.current_stream().cuda_stream)
        if any(agent.wait_loads([job]) for agent in self.agents):
            raise RuntimeError("a load failed")


def measure(name: str, geometry_name: str, layout: str, tokens: int, alike: bool, links: tuple[float, float]) -> bool:
    geometry = GEOMETRIES[geometry_name]
    count = geometry.blocks(tokens)
    with contextlib.ExitStack() as stack:
        memories = [Memory(geometry, layout, 2 * count + 16, device) for device in devices()]
        stored = count * geometry.block_bytes * (1 if alike else RANKS)
        engine = Engine(memories, int(3 * stored * 1.1) + (64 << 20), alike, stack)
        blocks = random.Random(1).sample(range(memories[0].block_count), 2 * count)
        source, target = blocks[:count], blocks[count:]
        for rank, memory in enumerate(memories):
            memory.fill(source, seed=7 if alike else 7 + rank)
            memory.fill(target, seed=None)
        synchronize()
        hashes = engine.new_hashes(count)
        with engine.sequence() as sequence:
            engine.save(sequence, hashes, source)
            engine.load(sequence, hashes, target)
            equal = all(memory.equal(source, target) for memory in memories)
            load_seconds = seconds_of(lambda: engine.load(sequence, hashes, target))

        def save_anew() -> None:
            with engine.sequence() as one:
                engine.save(one, engine.new_hashes(count), source)

        save_seconds = seconds_of(save_anew)
        used = [space["used"] * space["slot_bytes"] for space in _spaces(engine)]
    loaded = count * geometry.block_bytes * RANKS
    print(
        f"RESULT {name}: save {stored / save_seconds / 1e9:.1f} GB/s ({stored / save_seconds / links[0]:.2f} of both links), "
        f"load {loaded / load_seconds / 1e9:.1f} GB/s ({loaded / load_seconds / links[1]:.2f}), "
        f"host memory in use {sum(used) / 2**20:.0f} MiB, bytes equal {equal}",
        flush=True,
    )
    return equal


def _spaces(engine: Engine) -> list[dict[str, Any]]:
    return list(json.loads(engine.node.status())["spaces"])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=21_000)
    arguments = parser.parse_args()
    if torch.cuda.device_count() < RANKS:
        print(f"two GPUs are needed, here are {torch.cuda.device_count()}")
        return 2
    links = plain_copies(to_device=False), plain_copies(to_device=True)
    print(f"RESULT plain copies of both at once: {links[0] / 1e9:.1f} GB/s to host, {links[1] / 1e9:.1f} to the devices")
    cases = (
        ("TP 2, 32 KiB, in step", "mha16", "planes", False),
        ("TP 2, 32 KiB, apart", "mha16", "apart", False),
        ("TP 2, whole blocks", "mha16", "whole", False),
        ("MLA alike, in step", "mla16", "planes", True),
        ("MLA alike, apart", "mla16", "apart", True),
    )
    # No generator: each case is measured also after one with unequal bytes.
    return 0 if all([measure(*case[:3], arguments.tokens, case[3], links) for case in cases]) else 1


if __name__ == "__main__":
    sys.exit(main())
