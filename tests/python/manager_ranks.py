"""Managers, and their ranks in processes of their own, each with KV tensors in its memory, for test_manager*.py."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient

LAYERS, BLOCKS, TOKENS, HEADS, DIM = 3, 40, 16, 2, 8
_PATIENCE_SECONDS = 60


@dataclass(frozen=True)
class Shape:
    """`form`: how the tensors of an engine lie in memory."""

    form: str
    mla: bool = False

    def layout(self) -> KVCacheLayout:
        first = KVCacheLayoutType.BLOCKFIRST if self.form == "trt" else KVCacheLayoutType.LAYERFIRST
        heads = 1 if self.mla else HEADS
        return KVCacheLayout(first, LAYERS, BLOCKS, TOKENS, heads, DIM, is_mla=self.mla)

    def tensors(self) -> list[torch.Tensor]:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.bfloat16)

        if self.mla:
            if self.form == "sglang":
                return [zeros((BLOCKS + 1) * TOKENS - 1, 1, DIM) for _ in range(LAYERS)]
            return [zeros(BLOCKS, TOKENS, DIM) for _ in range(LAYERS)]
        if self.form == "vllm":
            return [zeros(2, BLOCKS, TOKENS, HEADS, DIM) for _ in range(LAYERS)]
        if self.form == "triton":
            return [zeros(BLOCKS, 2, TOKENS, HEADS, DIM) for _ in range(LAYERS)]
        if self.form == "sglang":
            return [zeros(BLOCKS * TOKENS, HEADS, DIM) for _ in range(2 * LAYERS)]
        return [zeros(BLOCKS, LAYERS, 2, TOKENS, HEADS, DIM)]

    def block(self, tensors: list[torch.Tensor], number: int) -> list[torch.Tensor]:
        """Views of all that belongs to a block."""
        if self.form == "sglang":
            return [tensor[number * TOKENS : (number + 1) * TOKENS] for tensor in tensors]
        if self.form == "vllm" and not self.mla:
            return [tensor[:, number] for tensor in tensors]
        return [tensor[number] for tensor in tensors]


def _main(conn: Connection, shape: Shape, client: dict[str, Any], port: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.manual_seed(client.get("intra_client_id", 0))
    tensors = shape.tensors()
    rank = KVTPClient(port, **client)
    rank.register_to_server(tensors, shape.layout())
    conn.send("registered")
    while True:
        command, *arguments = conn.recv()
        answer: Any = None
        if command == "fill":  # blocks
            for number in arguments[0]:
                for part in shape.block(tensors, number):
                    part.copy_(torch.randn(part.shape))
        elif command == "clear":
            for tensor in tensors:
                tensor.zero_()
        elif command == "read":
            answer = [
                b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in shape.block(tensors, number))
                for number in arguments[0]
            ]
        elif command == "suspend":
            answer = rank.suspend_gpu_mappings()
        elif command == "resume":
            rank.register_to_server(tensors, shape.layout(), resume=True)
        conn.send(answer)


class Ranks:
    def __init__(self, conns: list[Connection], processes: list[Any]) -> None:
        self.conns = conns
        self.processes = processes

    def ask(self, *command: Any) -> list[Any]:
        for conn in self.conns:
            conn.send(command)
        return [self._answer(conn) for conn in self.conns]

    @staticmethod
    def _answer(conn: Connection) -> Any:
        if not conn.poll(_PATIENCE_SECONDS):
            raise TimeoutError("a rank does not answer")
        return conn.recv()


@contextlib.contextmanager
def ranks(port: str, shape: Shape, clients: list[dict[str, Any]]) -> Iterator[Ranks]:
    """Processes that have registered; ended by SIGKILL, as engines' ranks may be."""
    context = multiprocessing.get_context("forkserver")  # torch is imported once, with the environment of that time
    context.set_forkserver_preload(["torch", "flexkv.manager"])
    environment = {name: value for name, value in os.environ.items() if "FLEXKV" in name}
    pairs = [context.Pipe() for _ in clients]
    processes = [
        context.Process(target=_main, args=(theirs, shape, client, port, environment), daemon=True)
        for (_, theirs), client in zip(pairs, clients, strict=True)
    ]
    for process in processes:
        process.start()
    group = Ranks([ours for ours, _ in pairs], processes)
    try:
        for conn in group.conns:
            assert Ranks._answer(conn) == "registered"
        yield group
    finally:
        for process in processes:
            process.kill()
            process.join()


def model(**fields: object) -> ModelConfig:
    return ModelConfig(num_layers=LAYERS, num_kv_heads=HEADS, head_size=DIM, **fields)  # type: ignore[arg-type]


@contextlib.contextmanager
def started(model_config: ModelConfig, cache: CacheConfig | None = None, **more: object) -> Iterator[KVManager]:
    manager = KVManager(model_config, cache or CacheConfig(tokens_per_block=TOKENS), **more)  # type: ignore[arg-type]
    manager.start()
    try:
        yield manager
    finally:
        manager.shutdown()


@contextlib.contextmanager
def engine(shape: Shape = Shape("vllm"), tp_size: int = 1) -> Iterator[tuple[KVManager, Ranks]]:
    with started(model(tp_size=tp_size, use_mla=shape.mla or None)) as manager:
        clients = [{"intra_client_id": rank} for rank in range(tp_size)]
        with ranks(manager.gpu_register_port, shape, clients) as group:
            assert manager.is_ready()
            yield manager, group


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128_000, count)


def slots(blocks: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(block * TOKENS, (block + 1) * TOKENS) for block in blocks])


def wait_ready(manager: KVManager) -> None:
    deadline = time.monotonic() + 60
    while not manager.is_ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)
