"""The command as a process of its own, with a stand-in for the core: signals, exit codes, streams."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import flexkv.config
import pytest

pytestmark = pytest.mark.usefixtures("clean_environment")

FAKE = Path(__file__).parent / "fake_core.py"
TIMEOUT_S = 60


def start(*arguments: str, with_core: bool = True, **environ: str) -> subprocess.Popen[str]:
    command = [str(FAKE)] if with_core else ["-m", "flexkv.cli"]
    package = str(Path(flexkv.config.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, *command, *arguments],
        env={**os.environ, "PYTHONPATH": package, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_as_from_a_terminal,
    )


def _as_from_a_terminal() -> None:
    """A test run that a shell started in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


@pytest.fixture
def daemon() -> Iterator[subprocess.Popen[str]]:
    process = start("serve", "--name", "prod", "--cpu-cache", "8GB")
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_until_a_signal(daemon: subprocess.Popen[str], number: signal.Signals) -> None:
    assert daemon.stdout is not None
    line = daemon.stdout.readline()
    socket = f"{os.environ['FLEXKV_RUNTIME_DIR']}/prod.sock"
    assert line == f"flexkv: node prod listens on {socket}, pool 8 GiB in 4 KiB pages, pid {daemon.pid}\n"
    daemon.send_signal(number)
    assert finish(daemon) == (0, f"flexkv: node prod stops ({number.name})\ndrains for 20 s\nstopped\n", "")
    assert not Path(socket).exists()


def test_a_daemon_sleeps(daemon: subprocess.Popen[str]) -> None:
    assert daemon.stdout is not None
    daemon.stdout.readline()

    def work() -> tuple[int, ...]:
        fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
        switches = [row for row in Path(f"/proc/{daemon.pid}/status").read_text().splitlines() if "ctxt" in row]
        return int(fields[11]) + int(fields[12]), *(int(row.split()[1]) for row in switches)

    time.sleep(0.2)
    before = work()
    time.sleep(1)
    assert work() == before


def test_status_of_a_daemon(daemon: subprocess.Popen[str]) -> None:
    assert daemon.stdout is not None
    daemon.stdout.readline()
    code, out, err = finish(start("status", "--json"))
    assert (code, err) == (0, "")
    assert json.loads(out)["nodes"][0]["node"]["pid"] == daemon.pid


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_watch_until_interrupted(daemon: subprocess.Popen[str], json_option: list[str]) -> None:
    assert daemon.stdout is not None
    daemon.stdout.readline()
    watch = start("status", "--watch", "0.2", *json_option)
    assert watch.stdout is not None
    rounds = 0
    while rounds < 3:
        line = watch.stdout.readline()
        assert line, finish(watch)
        rounds += "prod" in line
    watch.send_signal(signal.SIGINT)
    assert finish(watch)[0] == 0


def test_the_servers_settings_name_the_node(tmp_path: Path) -> None:
    file = tmp_path / "flexkv.yml"
    file.write_text("server_client_mode: true\nserver_recv_port: ipc:///tmp/flexkv_server_7\nenable_nixl: true\n")
    process = start("serve", "-c", str(file), FLEXKV_CPU_CACHE_GB="2", FLEXKV_LOGGING_PREFIX="mine")
    assert process.stdout is not None
    assert "node flexkv_server_7 listens" in process.stdout.readline()
    process.terminate()
    code, _, err = finish(process)
    assert code == 0
    assert "enable_nixl" in err
    assert "no effect yet" in err


@pytest.mark.parametrize(
    ("ssd_cache_gb", "reason"),
    [("0", "there is no SSD tier (ssd_cache_gb is 0)"), ("1", "this version has no path from drives to the GPU (")],
)
def test_gpudirect_storage_that_is_asked_for_is_a_line_at_the_start(
    ssd_cache_gb: str, reason: str, tmp_path: Path
) -> None:
    ssd = {"FLEXKV_SSD_CACHE_GB": ssd_cache_gb, "FLEXKV_SSD_CACHE_DIR": str(tmp_path)}
    process = start("serve", "--cpu-cache", "1", FLEXKV_ENABLE_GDS="1", **ssd)
    assert process.stdout is not None
    assert "node default listens" in process.stdout.readline()
    process.terminate()
    code, _, err = finish(process)
    assert code == 0
    (line,) = err.splitlines()
    assert f"GPUDirect Storage is not used: {reason}" in line
    assert line.endswith("; blocks go through host memory")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_metrics_of_a_daemon(host: str) -> None:
    metrics = {"FLEXKV_ENABLE_METRICS": "1", "FLEXKV_METRICS_PORT": "0", "FLEXKV_METRICS_HOST": host}
    process = start("serve", "--cpu-cache", "1", **metrics)
    assert process.stdout is not None and process.stderr is not None
    assert "node default listens" in process.stdout.readline()
    line = process.stderr.readline()
    address = next(word for word in line.split() if word.startswith("http://"))
    assert address.startswith(f"http://{host}:")
    with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
        assert b"flexkv_up 1.0" in answer.read()
    process.terminate()
    assert finish(process)[0] == 0


def test_exit_codes() -> None:
    assert finish(start("status"))[0] == 3
    assert finish(start("serve", "--cpu-cache", "0"))[0] == 2
    assert finish(start("serve", "--cpu-cach", "1"))[0] == 2
    code, out, err = finish(start("version", "--json", with_core=False))
    assert (code, err) == (0, "")
    assert json.loads(out)["python"]
