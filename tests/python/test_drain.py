"""`flexkv drain`, and the end of `flexkv serve`: the command with a stand-in for the core, then real daemons and Redis."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_core
import pytest
from flexkv.cli.app import app
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setitem(sys.modules, "flexkv._core", fake_core)
    started = fake_core.Node({"pool_bytes": 1 << 34})
    directory = Path(os.environ["FLEXKV_RUNTIME_DIR"])
    started.listen(str(directory), "default")
    yield directory / "default.sock"
    started.stop()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["drain", *arguments])


def test_a_node_that_is_drained_is_told(node: Path) -> None:
    result = run()
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "node default is drained: stop it, or start it anew to use it again\n"
    assert json.loads(run("--json").stdout)["nodes"][0]["drain"]["state"] == "drained"


def test_what_is_left_is_told_and_no_success(node: Path) -> None:
    node.with_suffix(".late").touch()
    result = run("--timeout", "3")
    assert result.exit_code == 1
    expected = "after 3 s there is still something left: 2 transfers of engines, 1,000 blocks for drives"
    assert expected in result.stderr
    (told,) = json.loads(run("--timeout", "3", "--json").stdout)["nodes"]
    assert told["error"] == expected and told["node"] == "default"


def test_what_the_remote_tier_was_given_and_what_it_did_not_take_is_told(node: Path) -> None:
    node.with_suffix(".host_only").write_text("1500")
    assert ", and the remote tier was offered 700 blocks of it: stop it" in run().stdout
    node.with_suffix(".late").touch()
    result = run("--timeout", "3")
    assert result.exit_code == 1
    assert "1,500 blocks that only host memory has and the remote tier did not take yet" in result.stderr
    assert json.loads(run("--json").stdout)["nodes"][0]["drain"]["host_only_blocks"] == 1500


def test_a_cluster_that_was_not_told_is_a_warning(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv.cli.drain_node._FAREWELL_S", 0.0)
    status = node.with_suffix(".status")
    cluster = {"address": "10.0.0.1:1", "directory": {"left": False, "trouble": "Connection refused"}}
    status.write_text(json.dumps(fake_core.STATUS | {"cluster": cluster}))
    result = run()
    assert result.exit_code == 0
    assert "its cluster could not be told (Connection refused)" in result.stderr


def test_no_node_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flexkv._core", fake_core)
    assert run("--name", "x").exit_code == 3


# ---- real daemons --------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    pytest.importorskip("torch")
    pytest.importorskip("flexkv._core")
    from cluster_machines import Cluster

    made: list[Cluster] = []

    def make(*names: str) -> list[Any]:
        try:
            made.append(Cluster(tmp_path, monkeypatch, *names))
        except OSError as error:
            pytest.skip(f"needs network namespaces and TUN devices (root): {error}")
        drives = {"FLEXKV_SSD_CACHE_GB": "256MB", "FLEXKV_ENABLE_P2P_SSD": "1", "FLEXKV_SSD_ADMISSION": "0"}
        return made[-1].start(
            **{name: drives | {"FLEXKV_SSD_CACHE_DIR": str(tmp_path / f"ssd of {name}")} for name in names}
        )

    yield make
    for one in made:
        one.close()


def drain(machine: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "flexkv.cli", "drain", "--name", machine.name, "--timeout", "60"]
    environment = os.environ | {"FLEXKV_RUNTIME_DIR": str(machine.runtime)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def failed_loads(machine: Any) -> dict[str, int]:
    return dict(machine.status["loads"]["failed"])


def test_a_daemon_is_drained_while_another_one_reads_from_it(cluster: Callable[..., list[Any]]) -> None:
    from cluster_machines import PROMPT_BLOCKS, wait_until

    a, b = cluster("a", "b")
    seeds = range(1, 9)
    for seed in seeds:
        a.engine.compute(seed)
    wait_until(lambda: b.knows(len(seeds)))
    drained: list[subprocess.CompletedProcess[str]] = []
    draining = threading.Thread(target=lambda: drained.append(drain(a)))
    draining.start()
    before = [b.engine.load(seed) for seed in seeds[:4]]
    draining.join()
    assert (drained[0].returncode, drained[0].stderr) == (0, "")
    assert failed_loads(b) == {} and set(before) <= {0, PROMPT_BLOCKS}
    wait_until(lambda: b.knows(0))
    assert b.engine.load(seeds[-1]) == 0, "nobody finds it there any more"
    assert a.engine.load(seeds[-1]) == 0, "nor its own engine, which goes on"
    assert a.status["node"]["drain"]["state"] == "drained"
    a.send(signal.SIGTERM)
    assert a.process.wait(60) == 0
    a.start()
    for seed in seeds:
        wait_until(lambda seed=seed: a.engine.loads_all(seed))
        wait_until(lambda seed=seed: b.engine.loads_all(seed))


def test_daemons_come_and_go_in_turns_and_nothing_is_lost(cluster: Callable[..., list[Any]]) -> None:
    from cluster_machines import wait_until

    machines = cluster("a", "b", "c")
    chance = random.Random(7)
    kept = 0
    for _ in range(4):
        leaver = chance.choice(machines)
        stay = [one for one in machines if one is not leaver]
        leaver.engine.compute(kept := kept + 1)
        leaver.send(signal.SIGTERM)
        while leaver.process.poll() is None:
            chance.choice(stay).engine.load(chance.randint(1, kept))
        assert leaver.process.returncode == 0, leaver.log
        stay[0].engine.compute(kept := kept + 1)
        leaver.start()
    for machine in machines:
        for seed in range(1, kept + 1):
            wait_until(lambda machine=machine, seed=seed: machine.engine.loads_all(seed))
