"""KV memory that is taken away from a worker while copies run, as vLLM's sleep does on GPUs: the worker side with a real
agent, client and node. Whoever touched the memory then would end the process, so this is a program of its own, too."""

from __future__ import annotations

import ctypes
import json
import mmap
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

BLOCKS = 48
BLOCK_TOKENS = 32
LAYERS = 4
# Large, so that copies are under way when the memory goes: about 10 ms for all of a layer.
PAGE_BYTES = 512 << 10
ROUNDS = 8
HALF = BLOCKS // 2
# After a failed load a worker saves nothing for so many steps at most.
DISTRUST = 32


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 30
    while not (result := condition()):
        if time.monotonic() > deadline:
            sys.exit(f"waited in vain for {what}")
        time.sleep(0.001)
    return result


def test_nothing_touches_kv_memory_that_is_unregistered() -> None:
    done = subprocess.run([sys.executable, "-P", __file__], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


class Worker:
    """The worker side over memory that can be made inaccessible, and the client that its scheduler would have."""

    def __init__(self, runtime: str) -> None:
        import torch
        from flexkv.config import load
        from flexkv.integration.vllm import identity
        from flexkv.integration.vllm.groups import Group
        from flexkv.integration.vllm.worker import WorkerSide

        from flexkv import _core

        identity.worker_rank = lambda config: 0  # vLLM's process groups are not there to ask
        config: Any = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(engine_id="engine"),
            parallel_config=SimpleNamespace(world_size=1, pipeline_parallel_size=1, tensor_parallel_size=1),
            cache_config=SimpleNamespace(num_gpu_blocks=BLOCKS),
        )
        self.node = _core.Node({"pool_bytes": 256 << 20, "mode": "embedded", "log_level": "error"})
        self.node.listen(runtime, identity.embedded_node_name(config))
        self.client = _core.Client.embedded(self.node, "engine", 1, "model", bytes(32), BLOCK_TOKENS)
        self.hashes = [number.to_bytes(32, "little") for number in range(1, BLOCKS + 1)]
        self._memory = mmap.mmap(-1, LAYERS * BLOCKS * PAGE_BYTES)
        whole = torch.frombuffer(self._memory, dtype=torch.uint8).view(LAYERS, BLOCKS, PAGE_BYTES)
        self.caches = {f"layer.{i}": whole[i] for i in range(LAYERS)}
        settings = load(extra={"runtime_dir": runtime, "log_level": "error"}, extra_origin="test")
        self.side = WorkerSide(config, settings, [Group(0, 1, BLOCK_TOKENS, 1, None, None)], BLOCKS)
        self.side.register_kv_caches(self.caches)
        self.step = 0
        self.results: dict[int, str] = {}

    def fill(self, first: int, count: int, value: int) -> None:
        for layer, cache in enumerate(self.caches.values()):
            cache[first : first + count] = value + layer

    def holds(self, first: int, count: int, value: int) -> bool:
        return all(
            bool((cache[first : first + count] == value + layer).all())
            for layer, cache in enumerate(self.caches.values())
        )

    def access(self, allowed: bool) -> None:
        address = next(iter(self.caches.values())).data_ptr()
        protection = mmap.PROT_READ | mmap.PROT_WRITE if allowed else 0
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), len(self._memory), protection) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    def wait_until_served(self) -> None:
        """By the agent of now: the node may not have heard yet that the one before is gone."""
        until(lambda: self.side._agents[0].counters()["attached"], "the agent")
        until(lambda: [e["state"] for e in json.loads(self.node.status())["engines"]] == ["ready"], "the node")

    def result(self, job: int) -> str:
        """What went wrong with it; empty: nothing."""
        while job not in self.results:
            self.client.wait_ended_jobs(30)
            ended = self.client.take_ended_jobs()
            if not ended:
                sys.exit("waited in vain for the end of a job")
            self.results.update(ended)
        return self.results[job]

    def order_save(self, sequence: int) -> int:
        """Of the first half of the device blocks."""
        from flexkv.integration.vllm.metadata import FlexKVMetadata

        self.step += 1
        job = self.client.save(sequence, self.hashes[:HALF], 0, list(range(HALF)))
        self.side.start_saves(FlexKVMetadata(step=self.step, saves=[(0, job)] if job else []))
        return job

    def order_load(self, sequence: int) -> None:
        """To the second half."""
        from flexkv.integration.vllm.metadata import FlexKVMetadata, LoadOrder

        self.step += 1
        blocks = list(range(HALF, BLOCKS))
        order = LoadOrder("request", False, blocks, [(0, self.client.load(sequence, 0, blocks))], complete=True)
        self.side.start_loads(FlexKVMetadata(step=self.step, loads=[order]), False)

    def load_result(self) -> bool:
        return bool(until(lambda: self.side.take_ended_loads(self.step), "the end of a load")[0][1])


def take_away(worker: Worker, round_number: int) -> None:
    """The worker is told before and after."""
    worker.wait_until_served()
    value = 10 * round_number + 1
    worker.client.reset()
    sequence = worker.client.open_sequence()
    worker.fill(0, HALF, value)
    job = worker.order_save(sequence)
    loading = round_number % 2 == 1
    if loading:  # else it goes while a save reads it
        assert worker.result(job) == ""
        worker.order_load(sequence)
    worker.side.unregister_kv_caches()
    worker.access(False)
    if loading:
        worker.load_result()
    # What the scheduler side still orders fails at once.
    worker.order_load(sequence)
    assert worker.load_result() is False
    worker.order_save(sequence)
    time.sleep(0.02)
    worker.access(True)
    worker.side.restore_kv_caches()
    worker.wait_until_served()
    worker.step += DISTRUST
    worker.fill(0, HALF, value + 1)
    worker.client.reset()
    sequence = worker.client.open_sequence()
    assert worker.result(worker.order_save(sequence)) == ""
    assert worker.client.lookup(sequence, worker.hashes[:HALF])[0] == HALF
    worker.order_load(sequence)
    assert worker.load_result() is True
    assert worker.holds(HALF, HALF, value + 1)
    worker.client.close_sequence(sequence)


def take_away_after_cancel(worker: Worker) -> None:
    """As with a vLLM that tells only the scheduler's side: the ranks stay registered, and are quiet once their jobs ended."""
    sequence = worker.client.open_sequence()
    worker.client.reset()
    job = worker.order_save(sequence)
    time.sleep(0.004)  # about when it copies: a test that is too early or too late passes, but not eight of them
    worker.client.cancel(job)
    worker.result(job)
    worker.access(False)
    time.sleep(0.02)
    worker.access(True)
    worker.client.close_sequence(sequence)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="flexkv-test-") as runtime:
        worker = Worker(runtime)
        for round_number in range(ROUNDS):
            take_away(worker, round_number)
            take_away_after_cancel(worker)
        worker.side.shutdown()
        worker.client.close()
        worker.node.stop()


if __name__ == "__main__":
    main()
