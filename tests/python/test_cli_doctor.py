"""`flexkv doctor` as a command: lines, JSON, exit codes, and what it measures where there is no GPU."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from flexkv.cli import measure_machine, run_bench
from flexkv.cli.app import app
from flexkv.doctor import copies, nvml
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.usefixtures("small")

no_gpu = pytest.mark.skipif(nvml.driver_is_there(), reason="there is a GPU")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture
def small(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that fits anywhere."""
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "64MB")


@pytest.fixture
def drive(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "nvme"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("FLEXKV_SSD_CACHE_DIR", str(directory))
    monkeypatch.setenv("FLEXKV_SSD_CACHE_GB", "64MB")
    return directory


@pytest.fixture
def core() -> None:
    pytest.importorskip("flexkv._core")


@pytest.mark.usefixtures("core", "drive")
@no_gpu
def test_a_machine_on_which_nothing_is_wrong() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1].endswith(", 0 wrong")
    for looked_at in ("FlexKV", "host memory", "pages of the pool", "io_uring", "locked memory", "runtime directory"):
        assert any(line.startswith(("ok ", "could be better ")) and f"  {looked_at}" in line for line in lines)
    assert result.stderr == ""


@pytest.mark.usefixtures("core", "drive")
def test_json() -> None:
    report = json.loads(run("--json").stdout)
    assert list(report) == ["checks"]
    verdicts = {"ok", "could be better", "wrong"}
    for check in report["checks"]:
        assert list(check) == ["looked_at", "verdict", "found", "advice"]
        assert check["verdict"] in verdicts
        assert check["found"]
        assert bool(check["advice"]) == (check["verdict"] != "ok")
        assert "\n" not in check["found"] + check["advice"]
    assert [check for check in report["checks"] if check["looked_at"] == "GPUDirect Storage"]


@pytest.mark.usefixtures("core")
def test_what_is_wrong_is_an_exit_code_and_says_what_to_do() -> None:
    directory = os.environ["FLEXKV_RUNTIME_DIR"]
    os.chmod(directory, 0o755)
    result = run("--json")
    assert result.exit_code == 1
    (check,) = [check for check in json.loads(result.stdout)["checks"] if check["looked_at"] == "runtime directory"]
    assert (check["verdict"], check["advice"]) == ("wrong", f"chmod 700 {directory}")
    assert run().exit_code == 1


def test_without_the_core_the_rest_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flexkv._core", None)  # type: ignore[arg-type]
    result = run("--json")
    assert result.exit_code == 1
    checks = json.loads(result.stdout)["checks"]
    assert checks[0]["verdict"] == "wrong"
    assert checks[0]["advice"] == "build it: pip install ."
    assert {"host memory", "runtime directory", "SSD tier"} <= {check["looked_at"] for check in checks}


def test_settings_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "much")
    result = run()
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("flexkv: cpu_cache_gb: wrong value 'much'")


@pytest.mark.usefixtures("core")
def test_copies_stand_beside_the_link(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the memory of this process for that of a GPU, and the smallest of the cases: the others take GiB."""
    monkeypatch.setattr(copies, "CASES", copies.CASES[:1])
    torch = pytest.importorskip("torch")
    steps: list[str] = []
    link, row = copies.measure_copies(torch.device("cpu"), 32, steps.append)
    assert steps == ["the link", row.what]
    assert link.of_link_to_host is None
    assert row.equal
    assert row.of_link_to_host == pytest.approx(row.to_host / link.to_host)
    assert row.of_link_to_device == pytest.approx(row.to_device / link.to_device)
    report: dict[str, Any] = {
        "copies": {"device": "host", "tokens": 32, "rows": [dataclasses.asdict(link), dataclasses.asdict(row)]},
        "drives": [],
        "gds": {"error": "none"},
    }
    assert not measure_machine.is_wrong(report)
    measure_machine.show(report)
    out = capsys.readouterr().out
    assert "runs of 18 KiB (MLA)" in out
    assert out.count("yes") == 2
    report["copies"]["rows"][1]["equal"] = False
    assert measure_machine.is_wrong(report)


@pytest.mark.usefixtures("core")
@no_gpu
def test_what_cannot_be_measured_is_a_line_each() -> None:
    result = run("--measure")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-2].startswith("copies: not measured: there is no NVIDIA driver")
    assert lines[-1].startswith("GPUDirect Storage: not measured: there is no directory of the SSD tier")


@pytest.mark.usefixtures("core")
@no_gpu
@pytest.mark.skipif(not run_bench.PROGRAM.exists(), reason="the wheel was built without libbenchmark-dev")
def test_a_drive_is_measured_and_left_as_it_was(drive: Path) -> None:
    result = run("--measure")
    assert result.exit_code == 0, result.output
    for op in ("read", "write"):
        assert f"{drive}: {op} 4 MiB" in result.stdout
    assert "GPUDirect Storage: not measured: " in result.stdout
    assert list(drive.iterdir()) == []


@pytest.mark.usefixtures("core")
def test_a_drive_that_cannot_be_measured_is_a_line(drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_bench, "PROGRAM", drive / "none")
    report = json.loads(run("--measure", "--json").stdout)["measured"]
    (measured,) = report["drives"]
    assert (measured["directory"], "libbenchmark-dev" in measured["error"]) == (str(drive), True)
    program = drive.parent / "program"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(run_bench, "PROGRAM", program)
    (measured,) = json.loads(run("--measure", "--json").stdout)["measured"]["drives"]
    assert measured["error"] == "flexkv-bench ended with code 3"
