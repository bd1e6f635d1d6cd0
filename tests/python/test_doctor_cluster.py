"""`flexkv doctor --cluster` beside real nodes, a real Redis and real stores."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flexkv._core")

from cluster_doctor import doctor, free_port, make_secret, node, redis_server  # noqa: E402
from flexkv.cli.app import app  # noqa: E402
from flexkv.doctor import cluster_nodes, shared_store  # noqa: E402
from flexkv.doctor.deadline import within  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("clean_environment"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
]

_PASSWORD = "no-ones-business"
_S3_SERVER = Path(__file__).parents[1] / "cpp" / "s3_server.py"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a node in a cluster whose Redis runs. The secret's file."""
    with redis_server(tmp_path, "--requirepass", _PASSWORD) as port:
        for name, value in {
            "FLEXKV_CPU_CACHE_GB": "16MB",
            "FLEXKV_ENABLE_P2P_CPU": "1",
            "FLEXKV_CLUSTER_SECRET_FILE": str(make_secret(tmp_path / "secret")),
            "FLEXKV_REDIS_PORT": str(port),
            "FLEXKV_REDIS_PASSWORD": _PASSWORD,
        }.items():
            monkeypatch.setenv(name, value)
        yield tmp_path / "secret"


def test_a_cluster_in_which_nothing_is_wrong(settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("FLEXKV_REMOTE_URL", f"file://{tmp_path}/store")
    with node("a", tmp_path), node("b", tmp_path):
        checks = doctor(0, settings.read_text(), _PASSWORD)
    assert {check["verdict"] for check in checks.values()} == {"ok"}
    for name in ("a", "b"):
        (check,) = (check for looked_at, check in checks.items() if looked_at.startswith(f"node {name} at 127.0.0.1:"))
        assert "it knows the secret" in check["found"]
        assert check["figures"]["round_trip_s"] > 0 and check["figures"]["bytes_per_s"] > 0
        assert 0 <= check["figures"]["silent_s"] <= 30
    assert checks["nodes of cluster default"]["figures"] == {"nodes": 2, "drained": 0, "silent": 0}
    assert set(checks[f"remote tier file://{tmp_path}/store"]["figures"]) == {"list_s", "write_s", "read_s"}
    assert checks[f"Redis at 127.0.0.1:{os.environ['FLEXKV_REDIS_PORT']}"]["figures"]["round_trip_s"] > 0


def test_lines_and_exit_code(settings: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--cluster"])
    assert result.exit_code == 0, result.output
    assert "could be better  nodes of cluster default: nobody is there" in result.output
    assert result.output.splitlines()[-1].endswith(", 1 could be better, 0 wrong")
    assert CliRunner().invoke(app, ["doctor", "--cluster", "--measure"]).exit_code == 2


def test_who_has_another_secret(settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with node("a", tmp_path):
        monkeypatch.setenv("FLEXKV_CLUSTER_SECRET_FILE", str(make_secret(tmp_path / "other")))
        checks = doctor(1, settings.read_text(), (tmp_path / "other").read_text())
    (check,) = (check for looked_at, check in checks.items() if looked_at.startswith("node a at "))
    assert check["verdict"] == "wrong"
    assert check["advice"] == "give all nodes the same cluster_secret_file and cluster_name"


def test_a_node_that_hangs_and_one_that_was_killed(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_nodes, "_GREETING_SECONDS", 0.2)
    with node("a", tmp_path) as hangs, node("b", tmp_path) as killed:
        hangs.send_signal(signal.SIGSTOP)
        killed.kill()
        killed.wait()
        checks = doctor(1)
    found = {looked_at.split(" at ")[0]: check["found"] for looked_at, check in checks.items()}
    assert "in time" in found["node a"]
    assert "refused" in found["node b"]


def test_a_drained_node_one_that_ended_and_one_that_died(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXKV_NODE_TTL_SECONDS", "3")

    def nodes_found() -> dict[str, Any]:
        return doctor(0)["nodes of cluster default"]

    def wait_until(found: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not found():
            assert time.monotonic() < deadline, nodes_found()
            time.sleep(0.2)

    with node("a", tmp_path) as drained, node("b", tmp_path) as ends, node("c", tmp_path) as dies:
        result = CliRunner().invoke(app, ["drain", "--name", "a"], env={"FLEXKV_RUNTIME_DIR": str(tmp_path / "a")})
        assert result.exit_code == 0, result.output
        wait_until(lambda: nodes_found()["figures"]["drained"] == 1)
        (check,) = (check for looked_at, check in doctor(0).items() if looked_at.startswith("node a at "))
        assert "it is drained: it gives nothing until it is started anew" in check["found"]
        ends.send_signal(signal.SIGTERM)
        assert ends.wait(120) == 0
        found = nodes_found()
        assert found["figures"]["silent"] == 0 and found["figures"]["nodes"] == 2, "it said that it ends"
        dies.kill()
        dies.wait()
        # Its last sign goes by itself; that it died is seen until others have taken its name off the list.
        wait_until(lambda: doctor(None)["nodes of cluster default"]["figures"]["nodes"] == 1)
        assert nodes_found()["figures"]["drained"] == 1, "for as long as it is there"
        drained.send_signal(signal.SIGTERM)
        assert drained.wait(120) == 0
        assert nodes_found()["found"] == "nobody is there"


def test_a_heartbeat_of_another_version(settings: Path, tmp_path: Path) -> None:
    with node("a", tmp_path):
        cli = ["redis-cli", "-p", os.environ["FLEXKV_REDIS_PORT"], "-a", _PASSWORD, "--no-auth-warning"]
        cluster = "flexkv:default:0"
        subprocess.run([*cli, "SADD", f"{cluster}:nodes", "00000000000000aa"], check=True)
        subprocess.run([*cli, "SET", f"{cluster}:node:00000000000000aa", "FDH9 and what else is in it"], check=True)
        checks = doctor(1)
    check = checks["signs of life in cluster default"]
    assert "another version" in check["found"] and "run one version of FlexKV" in check["advice"]
    assert checks["nodes of cluster default"]["figures"]["nodes"] == 1


@pytest.mark.parametrize(
    ("spoil", "advice"),
    [
        (lambda file: file.chmod(0o640), "chmod 600 "),
        (lambda file: file.write_text("short"), "openssl rand -base64 48"),
        (lambda file: file.unlink(), "openssl rand -base64 48"),
    ],
)
def test_a_secret_that_cannot_be_used(settings: Path, spoil: object, advice: str) -> None:
    spoil(settings)  # type: ignore[operator]
    check = doctor(1)[f"secret in {settings}"]
    assert check["verdict"] == "wrong" and advice in check["advice"]


def test_an_address_of_another_machine(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_LOCAL_IP", "192.0.2.1")
    assert "cannot listen there" in doctor(1)["local_ip 192.0.2.1"]["found"]


def test_settings_of_no_cluster() -> None:
    assert "enable_p2p_cpu" in doctor(1)["cluster"]["found"]


@pytest.mark.parametrize("fault", ["", "hang", "key", "bucket", "server"])
def test_a_store(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moto.server")
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-P", str(_S3_SERVER), str(port), "bucket"], stdout=subprocess.PIPE
    ) as server:
        try:
            assert server.stdout is not None
            key, secret = server.stdout.readline().decode().split()[:2]
            for name, value in {
                "FLEXKV_REMOTE_URL": "s3://none/p" if fault == "bucket" else "s3://bucket/p",
                "FLEXKV_REMOTE_ENDPOINT": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": key,
                "AWS_SECRET_ACCESS_KEY": "wrong" if fault == "key" else secret,
            }.items():
                monkeypatch.setenv(name, value)
            if fault == "hang":
                monkeypatch.setattr(shared_store, "_STEP_SECONDS", 0.2)
                urllib.request.urlopen(f"http://127.0.0.1:{port}/faults/hang/3", data=b"").close()
            if fault == "server":
                server.kill()
                server.wait()
            check = doctor(0 if fault == "" else 1, secret)[f"remote tier {os.environ['FLEXKV_REMOTE_URL']}"]
        finally:
            server.kill()
    if fault == "":
        assert set(check["figures"]) == {"list_s", "write_s", "read_s"}
        return
    found, advice = {
        "hang": ("no answer within 200 ms", "docs/operations/remote.md"),
        "key": ("HTTP 403", "s3:PutObject"),
        "bucket": ("NoSuchBucket", "make the bucket"),
        "server": ("onnect to", "docs/operations/remote.md"),
    }[fault]
    assert found in check["found"] and advice in check["advice"]


def test_a_store_that_is_not_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_REMOTE_URL", "file:///nowhere/kv")
    checks = doctor(1)
    assert checks["remote tier file:///nowhere/kv"]["advice"] == "mount the file system, or make the directory"
    assert checks["cluster"]["verdict"] == "ok"


def test_what_hangs_is_given_up() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        within(0.05, never.wait)
    never.set()
    assert within(60, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)
