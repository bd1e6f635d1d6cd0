"""`flexkv disk` and the SSD options of `flexkv serve`, with a stand-in for the core."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import fake_core
import pytest
from flexkv.cli import serve_node
from flexkv.cli.app import app
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.usefixtures("clean_environment", "core")


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flexkv._core", fake_core)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that the settings name, with a megabyte of blocks."""
    directory = tmp_path / "nvme"
    directory.mkdir()
    (directory / "01.blocks").write_bytes(bytes(1 << 20))
    monkeypatch.setenv("FLEXKV_SSD_CACHE_DIR", str(directory))
    return directory


def run(*arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(app, ["disk", *arguments], input=answer)


@pytest.mark.parametrize("command", [[], ["check"], ["clear"]])
def test_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


# ---- check


def test_check_of_the_directories_in_the_settings(cache: Path) -> None:
    result = run("check")
    assert result.exit_code == 0
    assert result.stdout == f"{cache}: 1,000 blocks (2 MiB) checked, all good\n"


def test_a_bad_block_is_an_exit_code_and_a_line(cache: Path) -> None:
    (cache / "bad").touch()
    result = run("check")
    assert result.exit_code == 1
    assert result.stdout == f"{cache}: 1,000 blocks (2 MiB) checked, 1 bad\n"
    assert result.stderr == f"flexkv: {cache}: space 01: block 7: its checksum is wrong\n"


def test_check_goes_on_after_a_directory_that_cannot_be_checked(cache: Path, tmp_path: Path) -> None:
    (cache / "used").touch()
    other = tmp_path / "other"
    other.mkdir()
    result = run("check", str(cache), str(tmp_path / "none"), str(other))
    assert result.exit_code == 1
    assert "in use by the process 4711" in result.stderr
    assert f"{tmp_path}/none: there is no such directory" in result.stderr
    assert f"{other}: 1,000 blocks" in result.stdout
    assert not (tmp_path / "none").exists()


def test_check_json(cache: Path) -> None:
    result = run("check", "--json", "--rate", "500MB/s", f"{cache};{cache}")
    (answer,) = json.loads(result.stdout)["directories"]
    assert answer["directory"] == str(cache)
    assert answer["bytes_per_second"] == 500 << 20
    assert answer["bad_blocks"] == 0
    (cache / "bad").touch()
    assert run("check", "--json").exit_code == 1


@pytest.mark.parametrize("rate", ["fast", "0", "-1", ""])
def test_a_rate_that_is_none(cache: Path, rate: str) -> None:
    assert run("check", "--rate", rate).exit_code == 2


def test_what_is_no_cache_is_refused_before_anybody_is_asked(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "etc"
    other.mkdir()
    (other / "foreign").touch()
    for result in (run("check", str(other)), run("clear", str(other)), run("clear", "--yes", str(other))):
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr == f"flexkv: {other}: not an SSD cache directory (there is no node.secret)\n"
    result = run("clear", "--yes", str(other), str(cache))
    assert result.exit_code == 1
    assert result.stdout == f"{cache}: 1 MiB freed\n"


def test_foreign_files_are_told(cache: Path) -> None:
    (cache / "a.txt").touch()
    (cache / "b.txt").touch()
    expected = "; 2 not of FlexKV, left alone: a.txt, ...\n"
    assert run("check").stdout == f"{cache}: 1,000 blocks (2 MiB) checked, all good{expected}"
    assert json.loads(run("check", "--json").stdout)["directories"][0]["foreign_count"] == 2
    assert run("clear", answer="n\n").stdout.startswith(f"{cache}: 1 MiB{expected}")


# ---- check while a node uses it


def serve_there(directory: Path, **scrub: Any) -> tuple[fake_core.Node, Path]:
    """A node that uses the directory, and what it says."""
    node = fake_core.Node({"pool_bytes": 1 << 30, "ssd_bytes": 1 << 30, "ssd_directories": [str(directory)]})
    node.listen(os.environ["FLEXKV_RUNTIME_DIR"], "default")
    drives = [{"directory": str(directory), "closed_bytes": 3 << 20}]
    told = node.path.with_suffix(".status")
    told.write_text(json.dumps({"disk": {"drives": drives, "scrub": fake_core.scrub_of(str(directory), **scrub)}}))
    return node, told


def test_a_node_checks_what_it_uses(cache: Path) -> None:
    (cache / "used").touch()
    node, told = serve_there(cache, state="done")
    result = run("check")
    node.stop()
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(
        f"{cache}: 900 blocks (900 MiB) checked, 3 MiB of models not in use left out, all good\n"
    )
    assert json.loads(told.read_text())["disk"]["scrub"]["bytes_per_s"] == 100 << 20


def test_a_node_that_finds_bad_blocks(cache: Path) -> None:
    node, told = serve_there(cache, state="done", damaged=2, unchecked=5)
    text = run("check", "--rate", "500MB", str(cache))
    answer = json.loads(run("check", "--json").stdout)["directories"]
    node.stop()
    assert text.exit_code == 1
    assert "2 bad, 5 not checked as the drive was off or busy" in text.stdout
    assert json.loads(told.read_text())["disk"]["scrub"]["bytes_per_s"] == 100 << 20
    assert [(one["directory"], one["state"], one["bad_blocks"]) for one in answer] == [(str(cache), "done", 2)]


def test_ctrl_c_ends_the_check(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    node, told = serve_there(cache, state="running")
    result = run("check")
    node.stop()
    assert result.exit_code == 1
    assert "900 blocks (900 MiB) checked, then it was stopped" in result.stdout
    assert json.loads(told.read_text())["disk"]["scrub"]["state"] == "stopped"


def test_a_node_that_does_not_want_to(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, bytes_per_second: int) -> str:
        raise RuntimeError("refused by the server: this node has no SSD tier")

    monkeypatch.setattr(fake_core, "scrub", refuse)
    node, _ = serve_there(cache, state="done")
    result = run("check")
    node.stop()
    assert result.exit_code == 1
    assert result.stderr == f"flexkv: {cache}: refused by the server: this node has no SSD tier\n"


# ---- clear


def test_clear_asks(cache: Path) -> None:
    result = run("clear", answer="n\n")
    assert result.exit_code == 1
    assert f"{cache}: 1 MiB" in result.stdout
    assert (cache / "01.blocks").exists()
    assert run("clear").exit_code == 1  # nobody answers
    assert (cache / "01.blocks").exists()
    result = run("clear", answer="y\n")
    assert result.exit_code == 0
    assert f"{cache}: 1 MiB freed" in result.stdout
    assert not (cache / "01.blocks").exists()


def test_clear_without_asking(cache: Path) -> None:
    assert run("clear", "--yes").stdout == f"{cache}: 1 MiB freed\n"


def test_clear_says_who_uses_it_and_clears_the_others(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "used").touch()
    result = run("clear", "--yes", str(other), str(cache))
    assert result.exit_code == 1
    assert "in use by the process 4711" in result.stderr
    assert not (cache / "01.blocks").exists()


def test_clear_of_nothing(tmp_path: Path) -> None:
    result = run("clear", "--yes", str(tmp_path / "none"))
    assert (result.exit_code, result.stdout) == (0, "There is no SSD cache.\n")
    assert not (tmp_path / "none").exists()


# ---- serve


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The options of the last node that was made."""
    options_of_node: dict[str, object] = {}

    class Node(fake_core.Node):
        def __init__(self, options: dict[str, object]) -> None:
            options_of_node.update(options)
            super().__init__(options)

    monkeypatch.setattr(fake_core, "Node", Node)
    return options_of_node


def test_serve_with_drives(
    seen: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fake_core.Node, "wait", lambda self, stop_fd: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setenv("FLEXKV_SSD_CACHE_DIR", "/from/environment")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        app, ["serve", "--ssd-cache", "2T", "--ssd-dir", "/a;/b", "--ssd-dir", "here", "--cpu-cache", "1"]
    )
    assert result.exit_code == 0, result.output
    assert seen["ssd_bytes"] == 2 << 40
    assert seen["ssd_directories"] == ["/a", "/b", str(tmp_path / "here")]
    assert f"SSD cache 2 TiB in /a, /b, {tmp_path}/here, pid" in result.output
    assert "flexkv: node default stops (SIGTERM)\n" in result.output
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 1 << 20, 0, 0, 0, 0, 0, 0, 255)))
    caplog.clear()
    CliRunner().invoke(app, ["serve", "--ssd-cache", "1", "--ssd-dir", "/a", "--cpu-cache", "1"])
    assert caplog.messages == []
    CliRunner().invoke(app, ["serve", "--ssd-cache", "2T", "--ssd-dir", "/a", "--cpu-cache", "1"])
    assert caplog.messages == [
        "ssd_cache_gb: 2 TiB from command line means 2 TiB in /a, where the file system has 4 GiB in all: the cache ends "
        "where it is full"
    ]


def test_serve_says_which_drives_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_core.Node, "wait", lambda self, stop_fd: None)
    command = ["serve", "--ssd-cache", "1", "--ssd-dir", "/a", "--ssd-dir", "/b", "--cpu-cache", "1"]
    monkeypatch.setattr(fake_core.Node, "unusable", {"/a": "read-only"})
    assert "SSD cache 512 MiB in /b (not in /a: read-only), pid" in CliRunner().invoke(app, command).output
    monkeypatch.setattr(fake_core.Node, "unusable", {"/a": "read-only", "/b": "no such drive"})
    assert "SSD cache OFF (/a: read-only; /b: no such drive), pid" in CliRunner().invoke(app, command).output
    off = {"state": "degraded", "messages": ["SSD cache is off: in use by the process 4711"]}
    monkeypatch.setattr(fake_core.Node, "disk", lambda self: None)
    monkeypatch.setattr(fake_core, "STATUS", fake_core.STATUS | {"health": off})
    assert "SSD cache OFF (in use by the process 4711), pid" in CliRunner().invoke(app, command).output


@pytest.mark.parametrize("given", ["/a;/b;/a", "/a;/b;/a/"])
def test_a_directory_that_is_given_twice_is_named(given: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--ssd-cache", "1", "--ssd-dir", given])
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "flexkv: ssd_cache_dir: wrong value '/a;/b;/a' from command line; '/a' is given twice;"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ssd-dwpd", "0.3"], {"ssd_dwpd": 0.3, "ssd_tbw": 0.0, "ssd_years": 5.0, "ssd_direct_io": True}),
        (
            ["--ssd-tbw", "7000", "--ssd-years", "4", "--no-ssd-direct-io"],
            {"ssd_dwpd": 0.0, "ssd_tbw": 7000.0, "ssd_years": 4.0, "ssd_direct_io": False},
        ),
    ],
)
def test_serve_with_a_budget(
    seen: dict[str, object], monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: dict[str, object]
) -> None:
    monkeypatch.setattr(fake_core.Node, "wait", lambda self, stop_fd: None)
    result = CliRunner().invoke(app, ["serve", "--ssd-cache", "2T", "--cpu-cache", "1", *arguments])
    assert result.exit_code == 0, result.output
    assert {key: seen[key] for key in expected} == expected


def test_serve_refuses_budgets_that_contradict_each_other() -> None:
    result = CliRunner().invoke(app, ["serve", "--ssd-cache", "1", "--ssd-dwpd", "1", "--ssd-tbw", "5"])
    assert result.exit_code == 1
    assert "ssd_tbw: wrong value 5 from command line; allowed: 0 beside ssd_dwpd" in result.output.replace("\n", " ")


def test_a_directory_without_a_size_is_refused() -> None:
    assert CliRunner().invoke(app, ["serve", "--ssd-dir", "/a"]).exit_code == 2
    assert serve_node.Options().ssd_dirs == []
