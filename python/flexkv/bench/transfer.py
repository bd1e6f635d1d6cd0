"""How fast blocks move between device and host memory, through node, client and agent, beside plain copies.

Every figure is a ratio to what this machine's link does in the same run. Bytes are checked on the way: random patterns
are saved, loaded into poisoned blocks and compared.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from flexkv.bench.compute import Compute
from flexkv.bench.geometry import GEOMETRIES, Geometry, Memory
from flexkv.bench.rig import Rig

TOKENS = (16, 64, 256, 1024, 4096, 21_000)
_LINK_BYTES = 256 << 20
_BESIDE_BYTES = 512 << 20
_BESIDE_SECONDS = 1.0


@dataclass
class Alone:
    """One size of transfer with nothing beside it; times are medians, from the order to where its end is known."""

    geometry: str
    layout: str
    tokens: int
    bytes: int
    save_seconds: float
    load_seconds: float
    equal: bool


@dataclass
class Beside:
    """Transfers over and over beside work of the GPU."""

    compute: str
    direction: str  # save, load or both
    step_slower: float  # how much longer a step of the work takes: 0.01 is 1 %
    bytes_per_second: float
    lost_seconds_per_gb: float


@dataclass
class Link:
    """Plain copies between one piece of pinned memory and the device."""

    to_host: float  # bytes per second
    to_device: float


def measure_link(device: torch.device) -> Link:
    on_device = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device)
    pinned = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def rate(to: torch.Tensor, source: torch.Tensor) -> float:
        seconds = []
        for _ in range(9):
            _synchronize(device)
            begin = time.perf_counter()
            to.copy_(source, non_blocking=True)
            _synchronize(device)
            seconds.append(time.perf_counter() - begin)
        return _LINK_BYTES / statistics.median(seconds)

    return Link(to_host=rate(pinned, on_device), to_device=rate(on_device, pinned))


def measure_alone(
    device: torch.device,
    geometries: list[str],
    layouts: list[str],
    tokens: list[int],
    stage_below: int,
    progress: Callable[[str], None],
) -> Iterator[Alone]:
    for name in geometries:
        geometry = GEOMETRIES[name]
        largest = geometry.blocks(max(tokens))
        for layout in layouts:
            memory = Memory(geometry, layout, 2 * largest + 64, device)
            with Rig(memory, _pool_bytes(geometry, 2 * largest + 64), stage_below) as rig:
                for count in tokens:
                    progress(f"{name} {layout} {count} tokens")
                    yield _measure_size(rig, count)
            del memory
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _measure_size(rig: Rig, tokens: int) -> Alone:
    memory = rig.memory
    geometry = memory.geometry
    count = geometry.blocks(tokens)
    device = memory.planes[0].device
    chance = random.Random(tokens)
    saves, loads, equal = [], [], True
    repeats = 5 if count * geometry.block_bytes > 1 << 30 else 9
    for turn in range(repeats + 1):
        blocks = chance.sample(range(memory.block_count), 2 * count)
        source, target = blocks[:count], blocks[count:]
        checked = turn == 0
        if checked:
            memory.fill(source, seed=tokens)
            memory.fill(target, seed=None)
        hashes = rig.new_hashes(count)
        with rig.sequence() as sequence:
            _synchronize(device)
            begin = time.perf_counter()
            rig.end_save(rig.begin_save(sequence, hashes, source))
            saved = time.perf_counter()
            rig.end_load(rig.begin_load(sequence, hashes, target))
            loaded = time.perf_counter()
        if checked:  # also the turn that warms up
            equal = memory.equal(source, target)
            continue
        saves.append(saved - begin)
        loads.append(loaded - saved)
    return Alone(
        geometry.name,
        memory.layout,
        tokens,
        count * geometry.block_bytes,
        statistics.median(saves),
        statistics.median(loads),
        equal,
    )


def measure_beside(
    device: torch.device, geometry: Geometry, layout: str, stage_below: int, compute: str
) -> Iterator[Beside]:
    count = _BESIDE_BYTES // geometry.block_bytes
    memory = Memory(geometry, layout, 4 * count, device)
    with Rig(memory, _pool_bytes(geometry, 12 * count), stage_below) as rig:
        work = Compute(compute, device)
        for direction in ("save", "load", "both"):
            alone = min(work.seconds(_BESIDE_SECONDS)[0] for _ in range(2))
            with _Traffic(rig, direction, count) as traffic:
                time.sleep(0.2)
                moved, begin = traffic.bytes, time.perf_counter()
                beside, _ = work.seconds(_BESIDE_SECONDS)
                rate = (traffic.bytes - moved) / (time.perf_counter() - begin)
            lost = (1 - alone / beside) / rate * 1e9
            yield Beside(compute, direction, beside / alone - 1, rate, lost)


class _Traffic:
    """A thread that saves, loads or both, two of each under way, until it is left."""

    def __init__(self, rig: Rig, direction: str, count: int) -> None:
        self.bytes = 0
        self._rig = rig
        self._directions = ("save", "load") if direction == "both" else (direction,)
        self._count = count
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="traffic")

    def __enter__(self) -> _Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            # A stream of its own: what is ordered here must not wait for the compute of the other thread.
            with torch.cuda.stream(torch.cuda.Stream()):
                self._move()
        except BaseException as error:
            self._error = error

    def _move(self) -> None:
        rig, count = self._rig, self._count
        slots = list(range(rig.memory.block_count))
        random.Random(1).shuffle(slots)
        parts = [slots[i * count : (i + 1) * count] for i in range(4)]
        kept = rig.new_hashes(count)
        with rig.sequence() as first:
            rig.end_save(rig.begin_save(first, kept, parts[0]))
        running: list[tuple[str, int, int]] = []
        turn = 0
        while not self._stop.is_set() or running:
            while not self._stop.is_set() and len(running) < 2 * len(self._directions):
                for direction in self._directions:
                    sequence = rig.open()
                    if direction == "save":
                        job = rig.begin_save(sequence, rig.new_hashes(count), parts[turn % 2])
                    else:
                        job = rig.begin_load(sequence, kept, parts[2 + turn % 2])
                    running.append((direction, sequence, job))
                turn += 1
            direction, sequence, job = running.pop(0)
            (rig.end_save if direction == "save" else rig.end_load)(job)
            rig.close(sequence)
            self.bytes += count * rig.memory.geometry.block_bytes


def _pool_bytes(geometry: Geometry, blocks: int) -> int:
    slot = -(-geometry.block_bytes // 4096) * 4096
    return max(int(blocks * slot * 1.1), 64 << 20)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

