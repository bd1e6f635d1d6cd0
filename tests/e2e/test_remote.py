"""vLLM on one node hits what vLLM on another node has computed, which is gone: from the store that both share, a directory, an
S3-compatible server or a Mooncake Store. Outputs are those of an engine without FlexKV."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import RunBoth
from engine import BLOCK, EngineConfig
from scenarios import LONG, emptied, generate, prompt, whole_blocks
from test_cluster import Machine, one_by_one, outputs

_PROMPTS = 6
_BLOCKS = _PROMPTS * (whole_blocks(LONG) // BLOCK)
_SERVERS = Path(__file__).parent.parent / "cpp"

_WAIT = """
import json, sys, time
from flexkv import _core
while json.loads(_core.query_status(sys.argv[1]))["remote"]["known_blocks"] < int(sys.argv[2]):
    time.sleep(0.05)
"""


class Store:
    """What the nodes share, and their daemons, all of which end with `close`."""

    def __init__(self, root: Path, variables: dict[str, str], *servers: subprocess.Popen[bytes]) -> None:
        self._root = root
        self._variables = variables
        self._processes = list(servers)

    def machine(self, name: str, **variables: str) -> Machine:
        directory = self._root / name
        (directory / "run").mkdir(parents=True, exist_ok=True)
        (directory / "run").chmod(0o700)
        ours = ("FLEXKV_", "AWS_")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)} | {
            "FLEXKV_RUNTIME_DIR": str(directory / "run"),
            "FLEXKV_CPU_CACHE_GB": "128MB",
            # The tiny model computes as fast as anything is read: with "auto", either may be chosen.
            "FLEXKV_SSD_LOAD_POLICY": "always",
            **self._variables,
            **variables,
        }
        argv = [sys.executable, "-P", "-m", "flexkv.cli", "serve", "--name", name]
        with (directory / "log").open("ab") as log:
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, cwd=directory, env=environment)
        self._processes.append(process)
        assert process.stdout is not None
        assert b"listens" in process.stdout.readline()
        machine = Machine(name, directory, process)
        while machine.status()["remote"]["trouble"]:  # of a cluster that has not told it yet what was reset
            time.sleep(0.05)
        return machine

    def close(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(port: int) -> None:
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)


def s3_server() -> tuple[dict[str, str], subprocess.Popen[bytes]]:
    port = free_port()
    server = subprocess.Popen([sys.executable, "-P", str(_SERVERS / "s3_server.py"), str(port), "bucket"], stdout=subprocess.PIPE)
    assert server.stdout is not None
    key, secret = server.stdout.readline().decode().split()[:2]
    variables = {
        "FLEXKV_REMOTE_URL": "s3://bucket/a/prefix",
        "FLEXKV_REMOTE_ENDPOINT": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
    }
    return variables, server


def mooncake_server(root: Path) -> tuple[Any, ...]:
    """With the Redis of the cluster that it needs."""
    port, http_port, redis_port = free_port(), free_port(), free_port()
    argv = [sys.executable, "-P", str(_SERVERS / "mooncake_server.py")]
    redis = subprocess.Popen(
        ["redis-server", "--port", str(redis_port), "--bind", "127.0.0.1", "--save", "", "--dir", str(root)],
        stdout=subprocess.DEVNULL,
    )
    master = subprocess.Popen([*argv, "master", str(port), str(http_port)])
    for each in (port, http_port, redis_port):
        wait_for(each)
    holder = subprocess.Popen([*argv, "holder", str(port), str(256 << 20)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert any(line == b"lends\n" for line in holder.stdout)
    secret = root / "secret"
    secret.touch(mode=0o600)
    secret.write_text("a secret of the tests' own, long enough")
    variables = {
        "FLEXKV_REMOTE_URL": f"mooncake://127.0.0.1:{port}/a/prefix",
        "FLEXKV_REMOTE_ENDPOINT": f"http://127.0.0.1:{http_port}",
        "FLEXKV_ENABLE_P2P_CPU": "1",
        "FLEXKV_CLUSTER_SECRET_FILE": str(secret),
        "FLEXKV_REDIS_PORT": str(redis_port),
        "FLEXKV_NODE_TTL_SECONDS": "3",
    }
    return variables, redis, master, holder


@pytest.fixture(params=["file", "s3", "mooncake"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "nodes").mkdir()
    if request.param == "s3":
        pytest.importorskip("moto.server")
        made = Store(tmp_path / "nodes", *s3_server())
    elif request.param == "mooncake":
        if find_spec("mooncake") is None:
            pytest.skip("scripts/setup --tests installs Mooncake")
        made = Store(tmp_path / "nodes", *mooncake_server(tmp_path))
    else:
        (tmp_path / "shared").mkdir()
        made = Store(tmp_path / "nodes", {"FLEXKV_REMOTE_URL": f"file://{tmp_path}/shared"})
    try:
        yield made
    finally:
        made.close()


def once_it_knows(reader: Machine, blocks: int) -> list[dict[str, Any]]:
    """A node looks for what the store has of a model once an engine of that model has come; then until it knows so much."""
    socket_path = str(reader.runtime / f"{reader.name}.sock")
    wait = {"op": "run", "argv": [sys.executable, "-P", "-c", _WAIT, socket_path, str(blocks)]}
    return [generate("before", [prompt(secrets.token_hex(4), BLOCK)]), wait, *emptied()]


def test_hits_what_a_node_that_is_gone_has_computed(
    store: Store, tiny_model: Path, tmp_path: Path, run_both: RunBoth
) -> None:
    steps = one_by_one()
    expected = outputs(run_both(EngineConfig(flexkv=True), steps).baseline)
    a = store.machine("a")
    computed = a.run(tiny_model, tmp_path / "on a", steps)
    assert outputs(computed) == expected
    assert {result.flexkv_hits for result in computed.values()} == {0}
    a.process.send_signal(signal.SIGTERM)  # what it has gathered is written at the end
    assert a.process.wait(20) == 0

    b = store.machine("b")
    hit = b.run(tiny_model, tmp_path / "on b", [*once_it_knows(b, _BLOCKS), *steps])
    assert outputs(hit) == expected | {"before": hit["before"].outputs}
    assert [hit[name].flexkv_hits for name in expected] == [whole_blocks(LONG)] * _PROMPTS
    status = b.status()
    assert status["remote"]["read"]["blocks"] == _BLOCKS
    assert status["health"]["messages"] == []
    b.process.kill()
    b.process.wait()

    # The same node again, from nothing but the store.
    b = store.machine("b")
    again = b.run(tiny_model, tmp_path / "on b again", [*once_it_knows(b, _BLOCKS), *steps])
    assert outputs(again) == expected | {"before": again["before"].outputs}
    assert [again[name].flexkv_hits for name in expected] == [whole_blocks(LONG)] * _PROMPTS
