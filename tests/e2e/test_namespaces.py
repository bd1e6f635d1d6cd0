"""A cluster whose nodes, Redis and store are each in a network namespace of their own, as on machines that share nothing but
wires: real vLLM at one node hits what real vLLM at another one has computed, from its host memory, from its drives, and
from the store once that node is gone. Outputs are those of an engine without FlexKV."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import RunBoth
from engine import BLOCK, EngineConfig
from scenarios import LONG, emptied, generate, prompt, whole_blocks
from small_network import Host, Network
from test_cluster import Machine, one_by_one, outputs
from test_vllm_daemon import wait_until

_PROMPTS = 6
_BLOCKS = _PROMPTS * (whole_blocks(LONG) // BLOCK)
_PORT = 6379
_S3_SERVER = Path(__file__).parents[1] / "cpp" / "s3_server.py"


class Machines:
    """Redis on a machine of its own, and daemons, each on another one; all end with `close`. Engines talk to their
    daemon by a UNIX socket only, so they are beside it whatever their namespace."""

    def __init__(self, root: Path, *names: str) -> None:
        """OSError: namespaces are not permitted."""
        self.network = Network("redis", "store", *names)
        self._root = root
        self._processes: list[subprocess.Popen[bytes]] = []
        secret = root / "secret"
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_urlsafe(48))
        redis = self.network.hosts["redis"].address
        ours = ("FLEXKV_", "AWS_")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)} | {
            "FLEXKV_CPU_CACHE_GB": "128MB",
            # The tiny model computes as fast as anything is read: with "auto", either may be chosen.
            "FLEXKV_SSD_LOAD_POLICY": "always",
            "FLEXKV_ENABLE_P2P_CPU": "1",
            "FLEXKV_ENABLE_P2P_SSD": "1",
            "FLEXKV_CLUSTER_SECRET_FILE": str(secret),
            "FLEXKV_REDIS_HOST": redis,
            "FLEXKV_REDIS_PORT": str(_PORT),
            "FLEXKV_NODE_TTL_SECONDS": "3",
        }
        argv = ["redis-server", "--port", str(_PORT), "--bind", redis, "--protected-mode", "no", "--save", ""]
        self._start("redis", [*argv, "--dir", str(root)])

    def _start(self, name: str, argv: list[str], **more: Any) -> subprocess.Popen[bytes]:
        process = self.network.hosts[name].start(argv, self._root / f"{name}.log", **more)
        self._processes.append(process)
        return process

    def start_store(self) -> dict[str, str]:
        """An S3-compatible server; what a node needs to use it."""
        log, address = self._root / "store.log", self.network.hosts["store"].address
        self._start("store", [sys.executable, "-P", str(_S3_SERVER), "9000", "bucket", address])

        def keys() -> list[list[str]]:
            """Its first line, among what libraries of its say."""
            return [words for line in log.read_text().splitlines() if len(words := line.split()) == 5]

        wait_until(lambda: log.exists() and bool(keys()))
        key, secret = keys()[0][:2]
        return {
            "FLEXKV_REMOTE_URL": "s3://bucket/prefix",
            "FLEXKV_REMOTE_ENDPOINT": f"http://{address}:9000",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
        }

    def machine(self, name: str, **variables: str) -> Machine:
        host: Host = self.network.hosts[name]
        directory = self._root / name
        (directory / "run").mkdir(parents=True, mode=0o700)
        where = {"FLEXKV_RUNTIME_DIR": str(directory / "run"), "FLEXKV_LOCAL_IP": host.address}
        argv = [sys.executable, "-P", "-m", "flexkv.cli", "serve", "--name", name]
        process = self._start(name, argv, cwd=directory, env=self.environment | where | variables)
        machine = Machine(name, directory, process)
        wait_until(lambda: (machine.runtime / f"{name}.sock").exists() or process.poll() is not None)
        assert process.poll() is None, (self._root / f"{name}.log").read_text()
        return machine

    def close(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self.network.close()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    root = tmp_path / "machines"
    root.mkdir()
    try:
        made = Machines(root, "a", "b")
    except OSError as error:
        pytest.skip(f"needs network namespaces and TUN devices (root): {error}")
    try:
        yield made
    finally:
        made.close()


_WAIT = """
import json, sys, time
from flexkv import _core
def known(status):
    return status["remote"]["known_blocks"] if sys.argv[2] == "remote" else status["cluster"]["directory"]["blocks"]
while known(json.loads(_core.query_status(sys.argv[1]))) < int(sys.argv[3]):
    time.sleep(0.05)
"""


def once_it_knows(reader: Machine, where: str) -> list[dict[str, Any]]:
    """A node follows what there is of a model once an engine of that model has come; then until it knows all of it."""
    argv = [sys.executable, "-P", "-c", _WAIT, str(reader.runtime / f"{reader.name}.sock"), where, str(_BLOCKS)]
    return [generate("before", [prompt(secrets.token_hex(4), BLOCK)]), {"op": "run", "argv": argv}, *emptied()]


def hits_all(reader: Machine, directory: Path, where: str, model: Path, computed: dict[str, list[list[int]]]) -> None:
    steps = one_by_one()
    hit = reader.run(model, directory, [*once_it_knows(reader, where), *steps])
    assert outputs(hit) == computed | {"before": hit["before"].outputs}
    assert [hit[name].flexkv_hits for name in computed] == [whole_blocks(LONG)] * _PROMPTS


def test_from_host_memory_and_drives(
    machines: Machines, tiny_model: Path, tmp_path: Path, run_both: RunBoth
) -> None:
    expected = outputs(run_both(EngineConfig(flexkv=True), one_by_one()).baseline)
    # Host memory for three of the six prompts (a block takes 32 KiB on a host): the others come from drives.
    (tmp_path / "ssd").mkdir()
    drives = {"FLEXKV_SSD_CACHE_GB": "64MB", "FLEXKV_SSD_CACHE_DIR": str(tmp_path / "ssd"), "FLEXKV_SSD_ADMISSION": "0"}
    a, b = machines.machine("a", FLEXKV_CPU_CACHE_GB="2MB", **drives), machines.machine("b")
    assert outputs(a.run(tiny_model, tmp_path / "on a", one_by_one())) == expected
    wait_until(lambda: a.status()["queues"]["disk_writes"] == 0)
    hits_all(b, tmp_path / "on b", "cluster", tiny_model, expected)
    assert a.cluster["lent"]["blocks"] == b.cluster["read"]["blocks"] == _BLOCKS
    assert a.status()["transfers"]["from_disk"]["blocks"] > 0


def test_from_the_store_once_the_node_is_gone(
    machines: Machines, tiny_model: Path, tmp_path: Path, run_both: RunBoth
) -> None:
    expected = outputs(run_both(EngineConfig(flexkv=True), one_by_one()).baseline)
    store = machines.start_store()
    a = machines.machine("a", **store)
    assert outputs(a.run(tiny_model, tmp_path / "on a", one_by_one())) == expected
    a.process.send_signal(signal.SIGTERM)  # what it has gathered is written at the end
    assert a.process.wait(60) == 0
    b = machines.machine("b", **store)
    hits_all(b, tmp_path / "on b", "remote", tiny_model, expected)
    assert b.status()["remote"]["read"]["blocks"] == _BLOCKS
    assert b.cluster["read"]["blocks"] == 0


@pytest.mark.parametrize(("transport", "package"), [("nixl", "nixl_cu13"), ("mooncake", "mooncake")])
def test_from_host_memory_directly(
    machines: Machines, tiny_model: Path, tmp_path: Path, transport: str, package: str
) -> None:
    if find_spec(package) is None:
        pytest.skip(f"scripts/setup --tests installs {package}")
    a, b = (machines.machine(name, FLEXKV_PEER_TRANSPORT=transport) for name in "ab")
    wait_until(lambda: {a.cluster["transport"], b.cluster["transport"]} == {transport})
    computed = outputs(a.run(tiny_model, tmp_path / "on a", one_by_one()))
    hits_all(b, tmp_path / "on b", "cluster", tiny_model, computed)
    assert b.cluster["read"]["one_sided_blocks"] == a.cluster["lent"]["one_sided_blocks"] == _BLOCKS
