"""How fast blocks come from drives to the device through node, client and agent, beside the slower of link and drive.

One prompt is saved and written behind. Before each load host memory makes room for other blocks, so that what is loaded
lies on drives only. Reads of the same drives at the same size and depth, and plain copies, are measured in turns with
the loads. Bytes are checked: the blocks are loaded into poisoned memory and compared with what was saved.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from flexkv.bench.geometry import Geometry, Memory
from flexkv.bench.rig import Rig
from flexkv.bench.transfer import measure_link

POOL_BYTES = 1 << 30
LENGTHS = (0, 64 << 20, 512 << 20, POOL_BYTES)  # bytes; at least a block, at most what a load may hold of the pool
# Of the pool: a prompt that is loaded from drives, and what may wait to be written at once (with room to spare).
_PROMPT_SHARE = 3 / 4
_SAVE_SHARE = 1 / 4
_TURNS = 7
_PATIENCE_SECONDS = 600

# GB/s of the drives by themselves: bytes of a load, seed of the turn.
DriveRate = Callable[[int, int], float]


@dataclass
class FromDrives:
    """Loads of one size; rates are medians in bytes per second, times in seconds from the order on."""

    geometry: str
    layout: str
    blocks: int
    bytes: int
    load: float
    drive: float  # reads alone: same block size, same number under way
    link: float  # plain copies to the device
    ratio: float  # of the load to the slower of both, median of the turns
    first_copied_seconds: float  # when the first blocks were seen on the device, in one load that is watched
    last_read_seconds: float  # when the last block was seen to have left the drives, in the same one
    equal: bool

    @property
    def overlaps(self) -> bool | None:
        """Whether copies began before reads ended; one block cannot."""
        return None if self.blocks == 1 else self.first_copied_seconds < self.last_read_seconds


def measure_from_drives(
    geometry: Geometry,
    layout: str,
    device: torch.device,
    directories: list[str],
    stage_below: int,
    drive_rate: DriveRate,
) -> Iterator[FromDrives]:
    """`directories`: empty ones, which a node gets; one per drive. POOL_BYTES are written over all of them."""
    slot = slot_bytes(geometry)
    longest = int(POOL_BYTES // slot * _PROMPT_SHARE)
    memory = Memory(geometry, layout, 2 * longest, device)
    source, target = list(range(longest)), list(range(longest, 2 * longest))
    options = {
        **{"ssd_directories": directories, "ssd_bytes": 2 * POOL_BYTES},
        # All is written, and what is there is loaded.
        **{"ssd_admission": False, "always_load": True},
    }
    with Rig(memory, POOL_BYTES, stage_below, options) as rig, rig.sequence() as sequence:
        hashes = rig.new_hashes(longest)
        memory.fill(source, seed=1)
        _save(rig, sequence, hashes, source, int(POOL_BYTES // slot * _SAVE_SHARE))
        for blocks in sorted({min(max(length // slot, 1), longest) for length in LENGTHS}):
            yield _measure_length(rig, hashes[:blocks], source, target[:blocks], drive_rate)


def slot_bytes(geometry: Geometry) -> int:
    """What a block takes in host memory and on drives."""
    return -(-geometry.block_bytes // 4096) * 4096


def _save(rig: Rig, sequence: int, hashes: list[bytes], source: list[int], at_once: int) -> None:
    for first in range(0, len(source), at_once):
        end = min(first + at_once, len(source))
        rig.end_save(rig.begin_save(sequence, hashes[:end], source[first:end], first))
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while (status := rig.status())["transfers"]["to_disk"]["blocks"] < end:
            if lost := status["transfers"]["to_disk"]["failed_blocks"]:
                raise RuntimeError(f"blocks were not written to the drives: {lost}; {status['health']['messages']}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the drives have not taken the blocks in {_PATIENCE_SECONDS} s")
            time.sleep(0.01)


def _measure_length(
    rig: Rig, hashes: list[bytes], source: list[int], target: list[int], drive_rate: DriveRate
) -> FromDrives:
    memory = rig.memory
    geometry = memory.geometry
    count = len(target)
    size = count * geometry.block_bytes
    device = memory.planes[0].device
    memory.fill(target, seed=None)
    watch = _Watch(rig, count)
    _load(rig, hashes, target, watch)
    equal = memory.equal(source[:count], target)
    loads, drives, links = [], [], []
    for turn in range(_TURNS):
        drives.append(drive_rate(count * slot_bytes(geometry), turn) * 1e9)
        links.append(measure_link(device).to_device)
        loads.append(size / _load(rig, hashes, target))
    ratios = [load / min(drive, link) for load, drive, link in zip(loads, drives, links, strict=True)]
    return FromDrives(
        **{"geometry": geometry.name, "layout": memory.layout, "blocks": count, "bytes": size, "equal": equal},
        load=statistics.median(loads),
        drive=statistics.median(drives),
        link=statistics.median(links),
        ratio=statistics.median(ratios),
        first_copied_seconds=watch.first_copied,
        last_read_seconds=watch.last_read,
    )


def _load(rig: Rig, hashes: list[bytes], target: list[int], watch: _Watch | None = None) -> float:
    """Seconds of one load of blocks that lie on drives only."""
    rig.push_out(POOL_BYTES // slot_bytes(rig.memory.geometry))
    with rig.sequence() as sequence, watch or contextlib.nullcontext():
        begin = time.perf_counter()
        rig.end_load(rig.begin_load(sequence, hashes, target))
        seconds = time.perf_counter() - begin
    if rig.from_drives < len(target):
        raise RuntimeError(f"{rig.from_drives} of {len(target)} blocks came from drives: host memory had the others")
    return seconds


class _Watch:
    """A thread that sees how far a load is, by the counters of agent and node. It costs the load some time."""

    def __init__(self, rig: Rig, count: int) -> None:
        self.first_copied = self.last_read = 0.0
        self._rig = rig
        self._copied = rig.loaded_blocks()
        self._read = self._read_blocks() + count
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read_blocks(self) -> int:
        return int(self._rig.status()["transfers"]["from_disk"]["blocks"])

    def _run(self) -> None:
        begin = time.perf_counter()
        while not (self.first_copied and self.last_read):
            last_look = self._stop.is_set()
            # In this order, and with one time for both: where copies are seen earlier than the last read, they were.
            copied = self._rig.loaded_blocks() > self._copied
            read = self._read_blocks() >= self._read
            now = time.perf_counter() - begin
            self.first_copied = self.first_copied or (now if copied else 0.0)
            self.last_read = self.last_read or (now if read else 0.0)
            if last_look:
                return
            time.sleep(0.0005)
