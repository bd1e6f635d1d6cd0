"""Machines of a cluster on a small network: a real redis-server and real daemons, each with an engine of ours beside it
that saves prompts and loads them, and compares each byte that it gets."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flexkv import _core
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.request import KVResponseStatus
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient
from manager_ranks import slots, tokens
from small_network import Host, Network

PROMPT_BLOCKS = 16
NODE_TTL_SECONDS = 3
LOAD_SECONDS = 2.0
# A load that the machine's other work delays; whoever hangs takes longer.
_SLOW_SECONDS = 15.0
# docs/decisions/0019 and 0027: two times to live and a third, 6 s, and the longest time that a peer is not asked. Twice
# that, as the machine may be busy.
CONVERGENCE_SECONDS = 2 * (NODE_TTL_SECONDS * 7 / 3 + 6 + 30)

_LAYERS, _BLOCKS, _TOKENS, _HEADS, _DIM = 4, 160, 16, 2, 128
_LAYOUT = KVCacheLayout(KVCacheLayoutType.LAYERFIRST, _LAYERS, _BLOCKS, _TOKENS, _HEADS, _DIM)
_REDIS_PORT = 6379


def wait_until(condition: Callable[[], bool], seconds: float = CONVERGENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


@dataclass(frozen=True)
class _Load:
    seed: int
    task: int
    blocks: range
    begun: float


class Engine:
    """An engine's scheduler and its only rank, in this process. It holds one prompt that it computes, and others that
    are being loaded."""

    def __init__(self, name: str) -> None:
        """At the daemon that the environment names."""
        self._caches = [torch.zeros(2, _BLOCKS, _TOKENS, _HEADS, _DIM, dtype=torch.bfloat16) for _ in range(_LAYERS)]
        shape = ModelConfig(num_layers=_LAYERS, num_kv_heads=_HEADS, head_size=_DIM, identity="model and weights")
        self._manager = KVManager(shape, CacheConfig(tokens_per_block=_TOKENS), server_recv_port=f"ipc:///tmp/{name}")
        self._manager.start()
        self._rank = KVTPClient(self._manager.gpu_register_port)
        self._rank.register_to_server(self._caches, _LAYOUT)
        self._places = 0

    def close(self) -> None:
        self._rank.shutdown()
        self._manager.shutdown()

    def compute(self, seed: int) -> None:
        """Saves the prompt; again until it is kept, as a node that has just started refuses."""
        for layer, content in zip(self._caches, _content(seed), strict=True):
            layer[:, :PROMPT_BLOCKS] = content

        def kept() -> bool:
            task = self._manager.put_async(_tokens(seed), slots(list(range(PROMPT_BLOCKS))))
            status = self._manager.wait(task, _SLOW_SECONDS)[task].status
            assert status is not KVResponseStatus.TIMEOUT
            return status is KVResponseStatus.SUCCESS

        wait_until(kept)

    def begin_load(self, seed: int) -> _Load:
        """Loads of up to 8 prompts at once."""
        self._places = self._places % 8 + 1
        blocks = range(self._places * PROMPT_BLOCKS, (self._places + 1) * PROMPT_BLOCKS)
        for layer in self._caches:
            layer[:, blocks.start : blocks.stop] = torch.nan
        begun = time.monotonic()
        task = self._manager.get_async(_tokens(seed), slots(list(blocks)))
        return _Load(seed, task, blocks, begun)

    def end_load(self, load: _Load) -> int:
        """How many blocks were loaded; all of them have the right bytes, and it was in time."""
        left = load.begun + LOAD_SECONDS + _SLOW_SECONDS - time.monotonic()
        response = self._manager.wait(load.task, left)[load.task]
        late = f"a load of {LOAD_SECONDS} s takes {_SLOW_SECONDS} s more"
        assert response.status is not KVResponseStatus.TIMEOUT, late
        loaded = int(response.get_mask().sum()) // _TOKENS
        end = load.blocks.start + loaded
        for number, (layer, content) in enumerate(zip(self._caches, _content(load.seed), strict=True)):
            same = torch.equal(layer[:, load.blocks.start : end], content[:, :loaded])
            assert same, f"prompt {load.seed}: wrong bytes in the {loaded} blocks that were loaded, layer {number}"
        return loaded

    def load(self, seed: int) -> int:
        return self.end_load(self.begin_load(seed))

    def loads_all(self, seed: int) -> bool:
        return self.load(seed) == PROMPT_BLOCKS


def _tokens(seed: int) -> Any:
    return tokens(PROMPT_BLOCKS * _TOKENS, seed)


def _content(seed: int) -> list[torch.Tensor]:
    """Of each layer: other bytes in each block of each prompt."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, PROMPT_BLOCKS, _TOKENS, _HEADS, _DIM)
    return [torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(_LAYERS)]


class Machine:
    """A daemon on a host, and an engine at it."""

    def __init__(self, name: str, host: Host, directory: Path, environment: dict[str, str]) -> None:
        self.name = name
        self._host = host
        self.runtime = directory / "run"
        self.runtime.mkdir(parents=True, mode=0o700)
        self._log = directory / "log"
        self._environment = environment | {"FLEXKV_RUNTIME_DIR": str(self.runtime), "FLEXKV_LOCAL_IP": host.address}
        self.process: subprocess.Popen[bytes] | None = None
        self._engine: Engine | None = None

    def start(self) -> None:
        argv = [sys.executable, "-P", "-m", "flexkv.cli", "serve", "--name", self.name]
        self.process = self._host.start(argv, self._log, env=self._environment, cwd=self.runtime.parent)

    def attach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The engine, once the daemon is there."""
        process = self.process
        assert process is not None
        wait_until(lambda: self._socket.exists() or process.poll() is not None)
        assert process.poll() is None, self.log
        ours = {name: value for name, value in self._environment.items() if name.startswith("FLEXKV_")}
        with monkeypatch.context() as patch:
            for name, value in (ours | {"FLEXKV_NODE": self.name}).items():
                patch.setenv(name, value)
            self._engine = Engine(self.name)

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "attach() comes first"
        return self._engine

    @property
    def _socket(self) -> Path:
        return self.runtime / f"{self.name}.sock"

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def status(self) -> dict[str, Any]:
        """What the daemon says of itself."""
        return dict(json.loads(_core.query_status(str(self._socket))))

    @property
    def cluster(self) -> dict[str, Any]:
        """And of the cluster."""
        return dict(self.status["cluster"])

    def peers(self) -> list[str]:
        return sorted(peer["name"] for peer in self.cluster["peers"])

    def knows(self, prompts: int) -> bool:
        """Whether it knows of as many prompts of the others (what two of them have is two)."""
        return bool(self.cluster["directory"]["blocks"] == prompts * PROMPT_BLOCKS)

    def send(self, signal_number: int) -> None:
        assert self.process is not None
        self.process.send_signal(signal_number)
        if signal_number == signal.SIGKILL:
            self.process.wait()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Redis:
    def __init__(self, host: Host, directory: Path) -> None:
        directory.mkdir()
        self._host = host
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}

    def start(self) -> None:
        """It begins empty."""
        argv = ["redis-server", "--port", str(_REDIS_PORT), "--bind", self._host.address, "--protected-mode", "no"]
        argv += ["--save", "", "--dir", str(self._directory)]
        self._process = self._host.start(argv, self._directory / "log", env=self.environment)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Cluster:
    """Redis and machines, each on a host of its own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        """OSError: namespaces are not permitted."""
        self.network = Network("redis", *names)
        self._monkeypatch = monkeypatch
        secret = root / "secret"
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_urlsafe(48))
        clean = {name: value for name, value in os.environ.items() if "FLEXKV" not in name}
        self._environment = clean | {
            "FLEXKV_CPU_CACHE_GB": "64MB",
            "FLEXKV_SSD_LOAD_POLICY": "always",
            "FLEXKV_LOAD_TIMEOUT_MS": str(int(LOAD_SECONDS * 1000)),
            "FLEXKV_ENABLE_P2P_CPU": "1",
            "FLEXKV_CLUSTER_SECRET_FILE": str(secret),
            "FLEXKV_REDIS_HOST": self.network.hosts["redis"].address,
            "FLEXKV_REDIS_PORT": str(_REDIS_PORT),
            "FLEXKV_NODE_TTL_SECONDS": str(NODE_TTL_SECONDS),
        }
        self._root = root
        self.redis = Redis(self.network.hosts["redis"], root / "redis")
        self.machines: dict[str, Machine] = {}

    def start(self, **environments: dict[str, str]) -> list[Machine]:
        """All machines, with more of an environment for those that are named ("redis", too); they know of each other
        then."""
        self.redis.environment = self._environment | environments.get("redis", {})
        self.redis.start()
        for name, host in self.network.hosts.items():
            if name != "redis":
                environment = self._environment | {"FLEXKV_NODE_ID": name} | environments.get(name, {})
                machine = Machine(name, host, self._root / name, environment)
                self.machines[name] = machine
                machine.start()
        machines = list(self.machines.values())
        for machine in machines:
            machine.attach(self._monkeypatch)
        wait_until(lambda: all(len(machine.peers()) == len(machines) - 1 for machine in machines))
        return machines

    def close(self) -> None:
        for machine in self.machines.values():
            machine.close()
        self.redis.kill()
        self.network.close()
