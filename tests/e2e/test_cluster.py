"""vLLM on one node of a cluster hits what vLLM on another node has computed: from its host memory, and from its drives.
Whatever happens to that node, outputs are those of an engine without FlexKV."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import RunBoth
from engine import BLOCK, EngineConfig, Results, run_engine
from scenarios import LONG, emptied, generate, prompt, whole_blocks
from test_vllm_daemon import wait_until

_PROMPTS = 6
_BLOCKS = _PROMPTS * (whole_blocks(LONG) // BLOCK)


@dataclasses.dataclass
class Machine:
    """A daemon in a cluster, as on a machine of its own."""

    name: str
    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def runtime(self) -> Path:
        return self.directory / "run"

    def status(self) -> dict[str, Any]:
        from flexkv import _core

        return json.loads(_core.query_status(str(self.runtime / f"{self.name}.sock")))

    @property
    def cluster(self) -> dict[str, Any]:
        return self.status()["cluster"]

    def run(self, model: Path, directory: Path, steps: list[dict[str, Any]]) -> Results:
        environment = (("FLEXKV_RUNTIME_DIR", str(self.runtime)), ("FLEXKV_NODE", self.name))
        return run_engine(EngineConfig(flexkv=True, environment=environment), model, steps, directory)


class Cluster:
    """Redis and daemons, all of which end with `close`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._secret = root / "secret"
        self._secret.touch(mode=0o600)
        self._secret.write_text(secrets.token_urlsafe(48))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._processes: list[subprocess.Popen[bytes]] = []
        argv = ["redis-server", "--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", str(root)]
        self._processes.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL))
        wait_until(self._redis_answers)

    def _redis_answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
            return True
        return False

    def machine(self, name: str, **variables: str) -> Machine:
        directory = self._root / name
        (directory / "run").mkdir(parents=True)
        (directory / "run").chmod(0o700)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FLEXKV_")} | {
            "FLEXKV_RUNTIME_DIR": str(directory / "run"),
            "FLEXKV_CPU_CACHE_GB": "128MB",
            # The tiny model computes as fast as anything is read: with "auto", either may be chosen.
            "FLEXKV_SSD_LOAD_POLICY": "always",
            "FLEXKV_ENABLE_P2P_CPU": "1",
            "FLEXKV_ENABLE_P2P_SSD": "1",
            "FLEXKV_CLUSTER_SECRET_FILE": str(self._secret),
            "FLEXKV_REDIS_PORT": str(self._port),
            "FLEXKV_NODE_TTL_SECONDS": "3",
            **variables,
        }
        argv = [sys.executable, "-P", "-m", "flexkv.cli", "serve", "--name", name]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=directory, env=environment)
        self._processes.append(process)
        assert process.stdout is not None
        assert b"listens" in process.stdout.readline()
        return Machine(name, directory, process)

    def close(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    root = tmp_path / "cluster"
    root.mkdir()
    made = Cluster(root)
    try:
        yield made
    finally:
        made.close()


def one_by_one() -> list[dict[str, Any]]:
    """Each prompt alone, with the engine's own cache empty."""
    steps = []
    for i in range(_PROMPTS):
        steps += [generate(f"prompt {i}", [prompt(f"cluster {i}", LONG)]), *emptied()]
    return steps


def outputs(results: Results) -> dict[str, list[list[int]]]:
    return {name: result.outputs for name, result in results.items()}


_WAIT = """
import json, sys, time
from flexkv import _core
while json.loads(_core.query_status(sys.argv[1]))["cluster"]["directory"]["blocks"] < int(sys.argv[2]):
    time.sleep(0.05)
"""


def once_it_knows(reader: Machine, blocks: int) -> list[dict[str, Any]]:
    """A node follows what others have of a model once an engine of that model has come; then until it knows so much."""
    socket_path = str(reader.runtime / f"{reader.name}.sock")
    wait = {"op": "run", "argv": [sys.executable, "-P", "-c", _WAIT, socket_path, str(blocks)]}
    return [generate("before", [prompt("other", BLOCK)]), wait, *emptied()]


def test_hits_what_another_node_has_in_host_memory(
    cluster: Cluster, tiny_model: Path, tmp_path: Path, run_both: RunBoth
) -> None:
    steps = one_by_one()
    expected = outputs(run_both(EngineConfig(flexkv=True), steps).baseline)
    a, b = cluster.machine("a"), cluster.machine("b")
    computed = a.run(tiny_model, tmp_path / "on a", steps)
    assert outputs(computed) == expected
    assert {result.flexkv_hits for result in computed.values()} == {0}
    hit = b.run(tiny_model, tmp_path / "on b", [*once_it_knows(b, _BLOCKS), *steps])
    assert outputs(hit) == expected | {"before": hit["before"].outputs}
    assert [hit[name].flexkv_hits for name in expected] == [whole_blocks(LONG)] * _PROMPTS
    assert b.cluster["read"]["blocks"] == a.cluster["lent"]["blocks"] == _BLOCKS
    again = b.run(tiny_model, tmp_path / "again", steps)
    assert outputs(again) == expected
    assert {result.flexkv_hits for result in again.values()} == {whole_blocks(LONG)}


@pytest.mark.parametrize(("transport", "package"), [("nixl", "nixl_cu13"), ("mooncake", "mooncake")])
def test_reads_another_nodes_memory_directly(
    cluster: Cluster, tiny_model: Path, tmp_path: Path, transport: str, package: str
) -> None:
    if find_spec(package) is None:
        pytest.skip(f"scripts/setup --tests installs {package}")
    steps = one_by_one()
    a, b = (cluster.machine(name, FLEXKV_PEER_TRANSPORT=transport) for name in "ab")
    wait_until(lambda: {a.cluster["transport"], b.cluster["transport"]} == {transport})
    computed = a.run(tiny_model, tmp_path / "on a", steps)
    hit = b.run(tiny_model, tmp_path / "on b", [*once_it_knows(b, _BLOCKS), *steps])
    assert outputs(hit) == outputs(computed) | {"before": hit["before"].outputs}
    assert [hit[name].flexkv_hits for name in computed] == [whole_blocks(LONG)] * _PROMPTS
    assert b.cluster["read"]["one_sided_blocks"] == a.cluster["lent"]["one_sided_blocks"] == _BLOCKS


def test_hits_what_another_node_has_on_drives(
    cluster: Cluster, tiny_model: Path, tmp_path: Path, run_both: RunBoth
) -> None:
    steps = one_by_one()
    expected = outputs(run_both(EngineConfig(flexkv=True), steps).baseline)
    # Host memory for three of the six prompts (a block takes 32 KiB on a host).
    (tmp_path / "ssd").mkdir()
    a = cluster.machine(
        "a",
        FLEXKV_CPU_CACHE_GB="2MB",
        FLEXKV_SSD_CACHE_GB="64MB",
        FLEXKV_SSD_CACHE_DIR=str(tmp_path / "ssd"),
        FLEXKV_SSD_ADMISSION="0",
    )
    b = cluster.machine("b")
    assert outputs(a.run(tiny_model, tmp_path / "on a", steps)) == expected
    wait_until(lambda: a.status()["queues"]["disk_writes"] == 0)
    hit = b.run(tiny_model, tmp_path / "on b", [*once_it_knows(b, _BLOCKS), *steps])
    assert outputs(hit) == expected | {"before": hit["before"].outputs}
    assert [hit[name].flexkv_hits for name in expected] == [whole_blocks(LONG)] * _PROMPTS
    assert a.status()["transfers"]["from_disk"]["blocks"] > 0


def test_the_engine_goes_on_when_the_other_node_is_killed(
    cluster: Cluster, tiny_model: Path, tmp_path: Path, run_both: RunBoth
) -> None:
    plain = one_by_one()
    expected = outputs(run_both(EngineConfig(flexkv=True), plain).baseline)
    a, b = cluster.machine("a"), cluster.machine("b")
    assert outputs(a.run(tiny_model, tmp_path / "on a", plain)) == expected
    # In the background, a moment after the next step began: the kill comes while b reads, or a little before or after.
    kill = {"op": "run", "argv": ["sh", "-c", f"sleep 0.05; kill -KILL {a.process.pid}"], "background": True}
    half = len(plain) // 2
    steps = [*once_it_knows(b, _BLOCKS), *plain[:half], kill, *plain[half:]]
    hit = b.run(tiny_model, tmp_path / "on b", steps)
    assert outputs(hit) == expected | {"before": hit["before"].outputs}
    assert hit["prompt 1"].flexkv_hits == whole_blocks(LONG)
    assert a.process.wait(60) == -signal.SIGKILL
    wait_until(lambda: b.cluster["peers"] == [])
