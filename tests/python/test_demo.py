"""The demo's command line, progress and comments. Its runs need vLLM: ./scripts/demo."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flexkv.demo import options, progress, report
from flexkv.demo.workload import Request, Workload
from rich.console import Console

PACKAGE = str(Path(options.__file__).parents[2])
SCRIPT = Path(__file__).parents[2] / "scripts/demo"


def without_packages(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As ./scripts/demo asks before anything is installed: -I -S leave Python's own library only."""
    program = f"import sys; sys.path.insert(0, {PACKAGE!r}); import flexkv.demo.options as o; o.parse(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, *arguments], capture_output=True, text=True, check=False
    )


def test_help_needs_nothing_installed() -> None:
    result = without_packages("--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ./scripts/demo ")
    for line in result.stdout.split("options:")[1].split("\n  -")[1:]:
        assert len(" ".join(line.split()).split(" ", 2)) == 3, f"no description: {line}"
    assert without_packages().returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--turns", "x"], "argument --turns: 'x' is not a whole number of at least 1"),
        (["--conversations", "1"], "argument --conversations: '1' is not a whole number of at least 2"),
        (["--model", "/nonexistent"], "argument --model: no such directory: /nonexistent"),
        (["--model", "/"], "not a model's directory, there is no config.json in it: /"),
        (["--json", "/nonexistent/x.json"], "argument --json: cannot be written"),
        (["--turns", "40"], "Use more conversations, fewer turns, or a longer first prompt"),
        (["--serve", "--in-process"], "not with --serve"),
    ],
)
def test_wrong_options_are_said_at_once(arguments: list[str], message: str) -> None:
    result = without_packages(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()[-1]) < 400


@pytest.mark.skipif(not SCRIPT.exists(), reason="not in a checkout")
@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--bogus"], 2)])
def test_the_script_answers_before_it_installs(tmp_path: Path, arguments: list[str], code: int) -> None:
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("demo", "common.sh"):
        (root / "scripts" / name).write_bytes((SCRIPT.parent / name).read_bytes())
    (root / "scripts/setup").write_text("#!/bin/sh\ntouch installed\nexit 9\n")
    for name in ("demo", "setup"):
        (root / "scripts" / name).chmod(0o755)
    (root / "python").symlink_to(PACKAGE)
    result = subprocess.run([root / "scripts/demo", *arguments], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert not (root / "installed").exists()
    assert subprocess.run([root / "scripts/demo"], cwd=root, capture_output=True, check=False).returncode == 9
    assert (root / "installed").exists()


def test_progress_without_a_terminal_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0)
    out = io.StringIO()
    with progress.DemoProgress(Console(file=out, width=20)) as shown:
        shown.begin("without FlexKV", "vLLM starts", 2)
        shown.say("requests")
        shown.advance("requests")
        shown.advance("requests")
        shown.end()
    assert out.getvalue().splitlines() == [
        "without FlexKV: vLLM starts",
        "without FlexKV: 1 of 2 requests",
        "without FlexKV: 2 of 2 requests",
    ]


def run_of(*seconds: float) -> list[Request]:
    """One conversation's turns."""
    return [Request(0, turn, 100, [1], taken, 0, 0) for turn, taken in enumerate(seconds)]


def test_comments_on_the_first_turn_and_on_slower_ones() -> None:
    workload = Workload(turns=3)
    (first,) = report.comments(workload, run_of(1, 1, 1), run_of(2, 0.5, 0.5))
    assert first.startswith("Turn 1: ")
    _, slower = report.comments(workload, run_of(1, 1, 1), run_of(1, 0.5, 1.5))
    assert slower.startswith("Slower with FlexKV in turn 3: prompts this short")
    assert os.linesep not in slower
