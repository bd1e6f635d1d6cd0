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
            parallel_config=SimpleNamespace(world_size=1, pipeline_parallel_size=1),
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
        until(lambda: [e["state"] for e in json.loads(self.node.status())["engines"]] == ["ready"], "the node")

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


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="flexkv-test-") as runtime:
        worker = Worker(runtime)
        for round_number in range(ROUNDS):
            worker.wait_until_served()
            value = 10 * round_number + 1
            worker.client.reset()
            worker.client.take_ended_jobs()
            sequence = worker.client.open_sequence()
            worker.fill(0, HALF, value)
            if round_number % 2 == 0:  # goes while a save reads it
                job = worker.order_save(sequence)
                assert job, "the node was not ready"
            else:  # goes while a load writes to it
                job = worker.order_save(sequence)
                assert until(worker.client.take_ended_jobs, "the end of a save") == [(job, "")]
                worker.order_load(sequence)
            worker.side.unregister_kv_caches()
            worker.access(False)
            if round_number % 2 == 1:
                worker.load_result()
            # What the scheduler side still orders fails at once.
            worker.order_load(sequence)
            assert worker.load_result() is False
            assert worker.order_save(sequence) == 0
            time.sleep(0.02)
            worker.access(True)
            worker.side.restore_kv_caches()
            worker.wait_until_served()
            worker.step += DISTRUST
            worker.fill(0, HALF, value + 1)
            worker.client.reset()
            sequence = worker.client.open_sequence()
            worker.client.take_ended_jobs()
            job = worker.order_save(sequence)
            assert until(worker.client.take_ended_jobs, "a save of a rank that came back") == [(job, "")]
            assert worker.client.lookup(sequence, worker.hashes[:HALF])[0] == HALF
            worker.order_load(sequence)
            assert worker.load_result() is True
            assert worker.holds(HALF, HALF, value + 1)
            worker.client.close_sequence(sequence)
            worker.client.take_ended_jobs()
        worker.side.shutdown()
        worker.client.close()
        worker.node.stop()


if __name__ == "__main__":
    main()
