"""`flexkv reset` of an engine on several machines: real daemons, each in a directory as on a machine of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

core = pytest.importorskip("flexkv._core")

from cluster_doctor import free_port, make_secret  # noqa: E402
from flexkv.other_machines import OtherNode, file_of, recall, remember  # noqa: E402

pytestmark = pytest.mark.usefixtures("clean_environment")


class Machine:
    def __init__(self, root: Path, name: str, secret: Path) -> None:
        self.runtime = root / name
        self.runtime.mkdir(mode=0o700)
        self.socket = self.runtime / "default.sock"
        self.listens = f"127.0.0.1:{free_port()}"
        self.environment = os.environ | {
            "FLEXKV_RUNTIME_DIR": str(self.runtime),
            "FLEXKV_CPU_CACHE_GB": "16MB",
            "FLEXKV_CLUSTER_SECRET_FILE": str(secret),
        }

    @contextmanager
    def node(self, **settings: str) -> Iterator[subprocess.Popen[str]]:
        argv = [sys.executable, "-P", "-m", "flexkv.cli", "serve"]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, env=self.environment | settings, text=True)
        try:
            assert process.stdout is not None and "listens" in process.stdout.readline()
            yield process
        finally:
            process.kill()
            process.communicate()

    def reset(self) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-P", "-m", "flexkv.cli", "reset"]
        return subprocess.run(argv, env=self.environment, capture_output=True, text=True, timeout=120)

    @property
    def resets(self) -> int:
        status: dict[str, Any] = json.loads(core.query_status(str(self.socket)))
        return int(status["node"]["resets"])


def test_all_nodes_of_the_engine_are_told_and_one_that_is_not_reached_is_no_success(tmp_path: Path) -> None:
    secret = make_secret(tmp_path / "secret")
    first, second, third = (Machine(tmp_path, name, secret) for name in ("first", "second", "third"))
    others = [OtherNode(machine.listens, str(secret), "default") for machine in (second, third)]
    with ExitStack() as running:
        running.enter_context(first.node())
        running.enter_context(second.node(FLEXKV_ENGINE_LISTEN=second.listens))
        with third.node(FLEXKV_ENGINE_LISTEN=third.listens):
            remember(first.socket, others)
            done = first.reset()
            assert (done.returncode, done.stderr) == (0, "")
            assert [machine.resets for machine in (first, second, third)] == [1, 1, 1]
        result = first.reset()
        assert result.returncode == 1
        assert "has forgotten all blocks, but the node of an engine's other machine was not told" in result.stderr
        assert third.listens in result.stderr and second.listens not in result.stderr
        assert str(file_of(first.socket)) in result.stderr
        assert [machine.resets for machine in (first, second)] == [2, 2], "whoever is reached is told all the same"


def test_a_node_that_knows_of_no_others_says_so(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "second", make_secret(tmp_path / "secret"))
    with machine.node(FLEXKV_ENGINE_LISTEN=machine.listens):
        result = machine.reset()
        assert result.returncode == 1
        assert "run `flexkv reset` on the first machine of each" in result.stderr
        assert machine.resets == 1


def test_who_has_another_secret_resets_nobody(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "second", make_secret(tmp_path / "secret"))
    other = make_secret(tmp_path / "other")
    with machine.node(FLEXKV_ENGINE_LISTEN=machine.listens):
        with pytest.raises(RuntimeError):
            core.reset_host(str(other), "default", machine.listens, 30.0)
        assert machine.resets == 0


def test_what_is_remembered(tmp_path: Path) -> None:
    socket = tmp_path / "default.sock"
    a, b = OtherNode("a:1", "/secret", "default"), OtherNode("b:1", "/secret", "default")
    assert recall(socket) == []
    remember(socket, [a])
    remember(socket, [b, a])
    assert recall(socket) == [a, b]
    assert [path.name for path in tmp_path.glob("default*")] == ["default.machines"]
    file_of(socket).write_text('[{"address": 1}]')
    with pytest.raises(ValueError, match=r"default\.machines cannot be read: remove it"):
        recall(socket)
