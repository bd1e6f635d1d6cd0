"""An engine of one rank with its own node, reduced to what moves blocks."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from types import TracebackType

import torch

from flexkv import _core
from flexkv.bench.geometry import Memory

_READY_SECONDS = 60
_PATIENCE_MS = 60_000


class Rig:
    """Owned by one thread. Saves and loads are ordered by the scheduler's client and armed by the rank's agent, as an
    engine does it, and waited for where the worker learns of them."""

    def __init__(self, memory: Memory, pool_bytes: int, stage_below: int) -> None:
        self.memory = memory
        self._hash_count = 0
        self._ended: dict[int, str] = {}  # job: what went wrong
        device = memory.planes[0].device
        self._cuda = device.type == "cuda"
        with contextlib.ExitStack() as stack:
            runtime = stack.enter_context(tempfile.TemporaryDirectory(prefix="flexkv-bench-"))
            self._node = _core.Node({"pool_bytes": pool_bytes, "mode": "embedded", "log_level": "error"})
            self._node.listen(runtime, "bench")
            stack.callback(self._node.stop)
            options = {"runtime_dir": runtime, "node_name": "bench", "engine_id": "bench", "rank": 0, "rank_count": 1}
            options |= {"log_level": "error", "gpu_stage_below_bytes": stage_below}
            where = f"cuda:{device.index or 0}" if self._cuda else "host"
            self._agent = _core.RankAgent(options, memory.describe(), memory.block_count, where)
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

    def begin_save(self, sequence: int, hashes: list[bytes], blocks: list[int]) -> int:
        job = self._client.save(sequence, hashes, 0, blocks)
        if job == 0:
            raise RuntimeError("the node refused a save")
        self._agent.arm_saves([job], self._stream())
        return int(job)

    def end_save(self, job: int) -> None:
        """Waits for the copy, then until the node has the blocks."""
        self._agent.fence([job], _PATIENCE_MS)
        deadline = time.monotonic() + _READY_SECONDS
        while job not in self._ended:
            self._ended.update(self._client.take_ended_jobs())
            if time.monotonic() > deadline:
                raise RuntimeError("a save did not end")
        if problem := self._ended.pop(job):
            raise RuntimeError(f"a save failed: {problem}")

    def begin_load(self, sequence: int, hashes: list[bytes], blocks: list[int]) -> int:
        matched, reason, _ = self._client.lookup(sequence, hashes)
        if matched < len(blocks):
            raise RuntimeError(f"{matched} of {len(blocks)} blocks found: {reason}")
        job = self._client.load(sequence, 0, blocks)
        self._agent.arm_loads([job], self._stream())
        return int(job)

    def end_load(self, job: int) -> None:
        if self._agent.wait_loads([job]):
            raise RuntimeError("a load failed")
