"""`flexkv bench ssd`, with stand-ins for flexkv-bench and fio, and with the real ones where they are installed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from flexkv.cli import bench_ssd, run_bench, ssd_program
from flexkv.cli.app import app
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.usefixtures("clean_environment")

INSTALLED = run_bench.PROGRAM

# Moves 1 GB a second through the drive and what it was told by threads; fails where `wrong` says so.
PROGRAM = """#!{python}
import json, os, sys
folders = [d + "/flexkv-bench-test" for d in sys.argv[3:]]
for folder in folders:
    os.mkdir(folder)
    open(folder + "/blocks", "w").write("left behind")
print(json.dumps({{"files": [f + "/blocks" for f in folders]}}), flush=True)
for line in sys.stdin:
    open({calls!r}, "a").write(line)
    words = line.split()
    if {wrong!r} and line.startswith({wrong!r}):
        answer = {{"error": "wrong bytes [bold]here"}}
    elif words[0] == "fill":
        answer = {{"memory": "4 KiB pages", "drives": ["DIR (ext4): io_uring with registered files"]}}
    elif words[0] == "drive":
        answer = {{"bytes": 10**9, "seconds": 1.0}}
    else:
        answer = {{"bytes": {threads}, "seconds": 1.0}}
    print(json.dumps(answer), flush=True)
"""
FIO = """#!{python}
import json, sys
open({calls!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
if {broken!r} and {broken!r} in sys.argv:
    print("fio: Cannot allocate memory", file=sys.stderr)
    sys.exit(1)
op = [a for a in sys.argv if a.startswith("--rw=")][0].replace("--rw=", "").replace("rand", "")
jobs = [a for a in sys.argv if a.startswith("--name=")]
print("note: about something")
print(json.dumps({{"jobs": [{{"error": {error}, op: {{"io_bytes": {bytes}, "runtime": 500}}}} for _ in jobs]}}))
"""


class Stand:
    """Writes the stand-ins, and runs the command with them."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.directory = path / "drive"
        self.directory.mkdir()
        self.monkeypatch = monkeypatch
        self.calls, self.fio_calls = path / "calls", path / "fio_calls"
        monkeypatch.setattr(run_bench, "PROGRAM", path / "flexkv-bench")
        monkeypatch.setattr(bench_ssd, "FIO", str(path / "fio"))
        self.program()

    def program(self, threads: int = 10**9, wrong: str = "") -> None:
        self._write(
            "flexkv-bench",
            PROGRAM.format(python=sys.executable, calls=str(self.calls), threads=threads, wrong=wrong),
        )

    def fio(self, moved: int = 5 * 10**8, error: int = 0, broken: str = "") -> None:
        text = FIO.format(python=sys.executable, calls=str(self.fio_calls), bytes=moved, error=error, broken=broken)
        self._write("fio", text)

    def _write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)

    def run(self, *arguments: str) -> Result:
        result = CliRunner().invoke(app, ["bench", "ssd", str(self.directory), "--seconds", "0.03", *arguments])
        assert list(self.directory.iterdir()) == []
        return result


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    monkeypatch.setattr(bench_ssd, "_BLOCKS", (64 << 10, 1 << 20))
    return Stand(tmp_path, monkeypatch)


def test_ours_is_held_against_the_best_of_the_others(stand: Stand) -> None:
    stand.fio(moved=6 * 10**8)  # in half a second
    result = stand.run("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    rows = {(row["op"], row["order"], row["block_bytes"]): row for row in report["benchmarks"]}
    assert len(rows) == 8
    row = rows["read", "random", 1 << 20]
    assert row["medians"] == {"flexkv": 1.0, "threads": 1.0, "fio": 1.2, "fio registered": 1.2}
    assert [len(rates) for rates in row["gigabytes_per_second"].values()] == [3, 3, 3, 3]
    assert row["ratio_to_best"] == pytest.approx(1 / 1.2) and row["met"] is False
    assert rows["read", "random", 64 << 10]["met"] is None
    text = stand.run().stdout
    assert "read random 1 MiB" in text and "1.20 (1.20-1.20)" in text and "0.83" in text
    assert "0 of 4 targets met" in text and "Load average before and after" in text
    stand.program(threads=9 * 10**8)
    stand.fio(moved=10**8)
    assert "4 of 4 targets met" in stand.run().stdout


def test_all_get_the_same_work_in_turns(stand: Stand) -> None:
    stand.fio()
    stand.run("--size", "300M")
    lines = stand.calls.read_text().splitlines()
    assert lines[0] == "fill"
    assert lines[1] == "drive read sequential 65536 0.01 0 1 32"
    # Whoever was first in one round is last in the next; reads come before anything is overwritten.
    assert [line.split()[0] for line in lines[1:7]] == ["drive", "threads", "threads", "drive", "drive", "threads"]
    operations = [line.split()[1] for line in lines[1:]]
    assert operations == sorted(operations)
    calls = stand.fio_calls.read_text()
    assert "--iodepth=32 --bs=65536 --rw=randread --size=314572800" in calls
    assert "--direct=1" in calls and f"--filename={stand.directory}/flexkv-bench-test/blocks" in calls
    assert "--fixedbufs=1 --registerfiles=1" in calls


def test_several_directories_are_measured_one_and_all(stand: Stand, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    stand.fio()
    report = json.loads(stand.run(str(second), "--json").stdout)
    assert {row["directories"] for row in report["benchmarks"]} == {1, 2}
    assert {row["medians"]["fio"] for row in report["benchmarks"] if row["directories"] == 2} == {2.0}
    assert list(second.iterdir()) == []


def test_without_fio(stand: Stand) -> None:
    result = stand.run()
    assert result.exit_code == 0, result.output
    assert "fio not found: without it only flexkv and the threads are measured" in result.stdout
    assert "4 of 4 targets met" in result.stdout


def test_what_fio_cannot_do_is_left_out_and_said(stand: Stand) -> None:
    stand.fio(broken="--fixedbufs=1")
    result = stand.run()
    assert result.exit_code == 0, result.output
    assert "fio registered left out: fio ended with code 1: fio: Cannot allocate memory" in result.stdout


def test_errors_of_a_run_are_told_and_fail_the_command(stand: Stand) -> None:
    stand.program(wrong="threads write")
    stand.fio()
    result = stand.run()
    assert result.exit_code == 1
    assert "write random 1 MiB  threads: wrong bytes [bold]here" in result.stdout
    stand.program()
    stand.fio(error=5)
    text = stand.run().stdout
    assert "fio left out: fio failed with code 0: Input/output error" in text


@pytest.mark.parametrize("wrong", ["fill"])
def test_files_that_cannot_be_written(stand: Stand, wrong: str) -> None:
    stand.program(wrong=wrong)
    result = stand.run()
    assert result.exit_code == 1
    about, error = result.stderr.splitlines()
    assert about.startswith("flexkv bench ssd: ") and " figures, about 1 min" in about
    assert error == "flexkv: wrong bytes [bold]here"


def test_a_program_that_dies(stand: Stand) -> None:
    stand._write("flexkv-bench", "#!/bin/sh\nexit 3\n")
    result = stand.run()
    assert result.exit_code == 1
    assert "flexkv-bench ended with code 3" in result.stderr


def test_a_drive_that_hangs(stand: Stand) -> None:
    stand._write("flexkv-bench", '#!/bin/sh\necho "{\\"files\\": []}"\nread x\necho "{}"\nread x\nexec sleep 60\n')
    stand.monkeypatch.setattr(ssd_program, "PATIENCE", 0.2)
    result = stand.run()
    assert result.exit_code == 1
    assert "does the drive hang?" in result.stderr


def test_space_is_looked_at_first(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ssd.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 30))
    result = stand.run("--size", "3G")
    assert result.exit_code == 1
    assert "3 GiB of free space are needed, 1 GiB are there" in result.stderr
    assert not stand.calls.exists()
    # Two directories of one file system share its space.
    second = stand.path / "second"
    second.mkdir()
    assert "1.5 GiB of free space are needed" in stand.run(str(second), "--size", "0.75G").stderr


def test_wrong_usage(stand: Stand) -> None:
    assert "'much' is not a size" in stand.run("--size", "much").stderr
    assert "at least 256 MiB" in stand.run("--size", "1M").stderr
    assert CliRunner().invoke(app, ["bench", "ssd"]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "ssd", str(stand.path / "none")]).exit_code == 2


@pytest.mark.skipif(not INSTALLED.exists(), reason="the wheel was built without Google Benchmark")
class TestInstalled:
    def test_a_short_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench_ssd, "_BLOCKS", (1 << 20,))
        arguments = ["bench", "ssd", str(tmp_path), "--size", "256M", "--seconds", "0.06", "--json"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert all(not row["errors"] for row in report["benchmarks"])
        assert all(rate > 0 for row in report["benchmarks"] for rate in row["medians"].values())
        assert "registered" in report["context"]["drives"][0]
        assert not list(tmp_path.glob("flexkv-bench-*"))

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_files_go_however_it_ends(self, tmp_path: Path, number: int) -> None:
        code = "from flexkv.cli.app import main; import sys; sys.argv = ['flexkv', *sys.argv[1:]]; main()"
        environment: dict[str, Any] = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            [sys.executable, "-c", code, "bench", "ssd", str(tmp_path), "--size", "256M", "--seconds", "1"],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        self.wait(lambda: any(file.stat().st_size > 0 for file in tmp_path.glob("flexkv-bench-*/blocks")))
        time.sleep(1)
        process.send_signal(number)
        assert process.wait(120) != 0
        self.wait(lambda: not list(tmp_path.glob("flexkv-bench-*")))

    @staticmethod
    def wait(condition: Any) -> None:
        until = time.monotonic() + 120  # a busy disk takes its time
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.05)
