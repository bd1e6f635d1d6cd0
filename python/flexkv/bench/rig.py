"""An engine of one rank with its own node, reduced to what moves blocks."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch

from flexkv import _core
from flexkv.bench.geometry import Memory

_READY_SECONDS = 60
_PATIENCE_MS = 60_000


class Rig:
    """Owned by one thread. Saves and loads are ordered by the scheduler's client and armed by the rank's agent, as an
    engine does it, and waited for where the worker learns of them."""

    def __init__(
        self, memory: Memory, pool_bytes: int, stage_below: int, node_options: Mapping[str, Any] | None = None
    ) -> None:
        """`stage_below`: runs of fewer bytes are staged. `node_options`: those of `_core.Node` beside the pool's."""
        self.memory = memory
        self.from_drives = 0  # of the blocks that the latest load found, those only on drives
        self._hash_count = 0
        self._ended: dict[int, str] = {}  # job: what went wrong
        device = memory.planes[0].device
        self._cuda = device.type == "cuda"
        with contextlib.ExitStack() as stack:
            runtime = stack.enter_context(tempfile.TemporaryDirectory(prefix="flexkv-bench-"))
            options = {"pool_bytes": pool_bytes, "mode": "embedded", "log_level": "error", **(node_options or {})}
            self._node = _core.Node(options)
            self._node.listen(runtime, "bench")
            stack.callback(self._node.stop)
            rank = {"runtime_dir": runtime, "node_name": "bench", "engine_id": "bench", "rank": 0, "rank_count": 1}
            rank |= {"log_level": "error", "gpu_stage_below_bytes": stage_below}
            where = f"cuda:{device.index or 0}" if self._cuda else "host"
            self._agent = _core.RankAgent(rank, memory.describe(), memory.block_count, where)
            stack.callback(self._agent.stop)
            tokens = memory.geometry.block_tokens
            self._client = _core.Client.embedded(self._node, "bench", 1, "bench", bytes(32), tokens)
            stack.callback(self._client.close)
            self._wait_until_ready()
            self._stack = stack.pop_all()

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not (self._client.ready() and self._agent.counters()["pool_registered"]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the rank agent is not ready after {_READY_SECONDS} s: {self._agent.counters()}")
            time.sleep(0.01)

    def new_hashes(self, count: int) -> list[bytes]:
        """Hashes that no block had before."""
        self._hash_count += count
        return [number.to_bytes(32, "little") for number in range(self._hash_count - count + 1, self._hash_count + 1)]

    def _stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self._cuda else 0

    def open(self) -> int:
        return int(self._client.open_sequence())

    def close(self, sequence: int) -> None:
        self._client.close_sequence(sequence)

    @contextlib.contextmanager
    def sequence(self) -> Iterator[int]:
        sequence = self.open()
        try:
            yield sequence
        finally:
            self.close(sequence)

    def begin_save(self, sequence: int, hashes: list[bytes], blocks: list[int], first: int = 0) -> int:
        """`blocks`: of the sequence's blocks from `first` on."""
        job = self._client.save(sequence, hashes, first, blocks)
        if job == 0:
            raise RuntimeError("the node refused a save")
        self._agent.arm_saves([job], self._stream())
        return int(job)

    def end_save(self, job: int) -> None:
        """Waits for the copy, then until the node has the blocks."""
        self._agent.fence([job], _PATIENCE_MS)
        if problem := self._wait_for_end(job):
            raise RuntimeError(f"a save failed: {problem}")

    def _wait_for_end(self, job: int) -> str:
        deadline = time.monotonic() + _READY_SECONDS
        while job not in self._ended:
            self._ended.update(self._client.take_ended_jobs())
            if time.monotonic() > deadline:
                raise RuntimeError("a save did not end")
        return self._ended.pop(job)

    def push_out(self, count: int) -> None:
        """Host memory makes room for so many other blocks, which then do not come."""
        deadline = time.monotonic() + _READY_SECONDS
        while self.status()["queues"]["jobs_in_flight"] > 0:  # what they use stays
            if time.monotonic() > deadline:
                raise RuntimeError("a job did not end")
            time.sleep(0.001)
        with self.sequence() as sequence:
            job = self._client.save(sequence, self.new_hashes(count), 0, [0] * count)
            self._client.cancel(job)
            self._wait_for_end(job)

    def begin_load(self, sequence: int, hashes: list[bytes], blocks: list[int]) -> int:
        matched, reason, self.from_drives = self._client.lookup(sequence, hashes)
        if matched < len(blocks):
            raise RuntimeError(f"{matched} of {len(blocks)} blocks found: {reason}")
        job = self._client.load(sequence, 0, blocks)
        self._agent.arm_loads([job], self._stream())
        return int(job)

    def end_load(self, job: int) -> None:
        if self._agent.wait_loads([job]):
            raise RuntimeError("a load failed")

    def status(self) -> dict[str, Any]:
        """That of the node, as `flexkv status --json` has it."""
        return dict(json.loads(self._node.status()))

    def loaded_blocks(self) -> int:
        """Those that the agent has copied to the device so far."""
        return int(self._agent.counters()["loaded_blocks"])
