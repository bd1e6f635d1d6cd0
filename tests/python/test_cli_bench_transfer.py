"""`flexkv bench transfer --ssd` on host memory, with the real node, agent and drives of this machine."""

import json
import shutil
from pathlib import Path

import pytest
from flexkv.bench import drives
from flexkv.cli import bench_from_drives, run_bench
from flexkv.cli.app import app
from typer.testing import CliRunner, Result

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("clean_environment")

MIB = 1 << 20


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "transfer", "--device", "host", *arguments])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    if not run_bench.PROGRAM.exists():
        pytest.skip("the wheel has no flexkv-bench")
    monkeypatch.setattr(drives, "POOL_BYTES", 64 * MIB)
    monkeypatch.setattr(drives, "LENGTHS", (0, 16 * MIB, 64 * MIB))
    monkeypatch.setattr(drives, "_TURNS", 1)
    monkeypatch.setattr(bench_from_drives, "_FILE_BYTES", 256 * MIB)
    monkeypatch.setattr(bench_from_drives, "_DRIVE_SECONDS", 0.01)


@pytest.mark.usefixtures("small")
def test_loads_from_drives_are_held_against_the_slower_of_drive_and_link(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    result = run("--json", "--geometry", "mha16", *(part for place in places for part in ("--ssd", str(place))))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    rows = report["from_drives"]
    assert [row["bytes"] // MIB for row in rows] == [4, 16, 48]
    for row in rows:
        assert row["equal"] is True
        assert row["ratio"] == pytest.approx(row["load"] / min(row["drive"], row["link"]))
        assert row["first_copied_seconds"] > 0 and row["last_read_seconds"] > 0
    assert rows[0]["overlaps"] is None
    assert len(report["drives"]) == 2
    assert [list(place.iterdir()) for place in places] == [[], []]


@pytest.mark.usefixtures("small")
def test_wrong_bytes_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drives, "LENGTHS", (0,))
    monkeypatch.setattr(drives.Memory, "equal", lambda *_: False)
    result = run("--geometry", "mha16", "--ssd", str(tmp_path))
    assert result.exit_code == 1
    assert "NO" in result.stdout and "of the slower (>= 0.9)" in result.stdout.replace("\n", " ")


def test_lengths_of_its_own(tmp_path: Path) -> None:
    result = run("--ssd", str(tmp_path), "--tokens", "16")
    assert result.exit_code == 2
    assert "--tokens does not go with --ssd" in result.stderr
    shutil.rmtree(tmp_path)
    assert run("--ssd", str(tmp_path)).exit_code == 2
