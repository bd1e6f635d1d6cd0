"""`flexkv bench`: runs the program `flexkv-bench` of the wheel and shows its figures beside the targets."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from flexkv.cli.bench_progress import BenchProgress
from flexkv.cli.bench_targets import targets_of
from flexkv.cli.common import EXIT_FAILED, console, fail, print_json

PROGRAM = Path(__file__).parents[1] / "bin" / "flexkv-bench"

# conversation_trace.jsonl of Mooncake's FAST'25 release: the targets of `replay` are for it alone.
_MOONCAKE_SHA256 = "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df"
_NAME_WIDTH = 32
_PIPE_WIDTH = 2000  # no row is that wide: whoever reads a pipe looks for whole names
# What a run takes on a machine with two cores at rest.
_TAKES = {
    "index": "some minutes",
    "keys": "about 10 s",
    "host": "about a minute",
    "replay": "a minute or two with Mooncake's trace",
    "recovery": "about a minute for 10 million blocks",
}
_NANOSECONDS = {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9}
# What Google Benchmark writes about every run; all else that is a number are figures of the benchmark itself.
_ABOUT_A_RUN = {
    *("family_index", "per_family_instance_index", "repetitions", "repetition_index", "threads", "iterations"),
    *("real_time", "cpu_time"),
}
_IN_SECONDS = {"per_block", "raw_read", "cpu", "found", "emitted", "inserted", "lookup"}
_HOW_IT_WAS_RUN = re.compile(r"/(manual_time|real_time|iterations:\d+|min_time:[\d.]+)(?=/|$)")


def run(suite: str, as_json: bool, argument: Path | None = None, options: Sequence[str] = ()) -> None:
    command = [str(program()), suite, *([str(argument)] if argument is not None else []), *options]
    report = _execute(command, suite)
    runs = list(_runs(report))
    figures = {row["name"]: row["figures"] for row in runs}
    has_targets = suite != "replay" or argument is None or _is_mooncakes(argument)
    for row in runs:
        targets = targets_of(row["name"], figures) if has_targets else {}
        row["targets"] = {
            figure: {"limit": target.limit, "at_least": target.at_least, "met": target.met(row["figures"][figure])}
            for figure, target in targets.items()
        }
    if as_json:
        print_json({"suite": suite, "context": report.get("context", {}), "benchmarks": runs})
    else:
        _show(runs)
        if not has_targets:
            print("no targets: they are set for Mooncake's conversation trace, and this is another one")
    if any(row["error"] for row in runs):
        raise typer.Exit(EXIT_FAILED)


def program() -> Path:
    if not PROGRAM.exists():
        fail(
            f"this installation has no benchmarks ({PROGRAM} is missing): it was built where Google Benchmark is not "
            "installed; install it (Debian: libbenchmark-dev), then `pip install .` again"
        )
    return PROGRAM


def _execute(command: list[str], suite: str) -> dict[str, Any]:
    listed = subprocess.run([*command, "--benchmark_list_tests"], check=False, capture_output=True, text=True)
    if listed.returncode != 0:
        fail(listed.stderr.strip() or f"{PROGRAM} ended with code {listed.returncode}")
    names, title = listed.stdout.split(), f"flexkv bench {suite}"
    with tempfile.TemporaryDirectory(prefix="flexkv-bench-") as directory:
        out, messages = Path(directory) / "out.json", Path(directory) / "messages"
        about = f"{len(names)} figures, {_TAKES[suite]}"
        with messages.open("w") as stderr, BenchProgress(title, about, len(names)) as progress:
            process = subprocess.Popen(
                [*command, f"--benchmark_out={out}", "--benchmark_out_format=json"],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
            with process:
                try:
                    assert process.stdout is not None
                    left = set(names)
                    for line in process.stdout:  # a line for each benchmark that is done
                        name = line.split(maxsplit=1)[0] if line.strip() else ""
                        if name in left:
                            left.remove(name)
                            progress.advance(name)
                except BaseException:
                    process.kill()
                    raise
        if process.returncode != 0:
            last = "\n".join(messages.read_text(errors="replace").splitlines()[-10:])
            fail(f"{PROGRAM} ended with code {process.returncode}\n{last}")
        return dict(json.loads(out.read_text()))


def _runs(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for row in report.get("benchmarks", []):
        figures: dict[str, float] = {}
        error = row.get("error_message", "failed") if row.get("error_occurred") else ""
        if not error:
            # Of benchmarks that time themselves, the processor time tells nothing: it has the preparations in it.
            timed = "real_time" if re.search("/(manual|real)_time", row["name"]) else "cpu_time"
            figures["time_ns"] = row[timed] * _NANOSECONDS[row["time_unit"]]
            figures |= {key: row[key] for key in row if key not in _ABOUT_A_RUN and _is_number(row[key])}
        yield {"name": _HOW_IT_WAS_RUN.sub("", row["name"]), "figures": figures, "error": error}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_mooncakes(trace: Path) -> bool:
    with trace.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == _MOONCAKE_SHA256


def _show(runs: list[dict[str, Any]]) -> None:
    """A table for each kind of benchmark (the first part of the name), a column for each figure of it."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in runs:
        kinds.setdefault(row["name"].split("/")[0], []).append(row)
    for rows in kinds.values():
        columns = list(dict.fromkeys(figure for row in rows for figure in row["figures"]))
        table = Table(box=None, pad_edge=False, header_style="bold")
        # Where a terminal is too narrow, headers are folded rather than cut, and names last.
        table.add_column("benchmark", overflow="fold", min_width=min(_NAME_WIDTH, max(len(row["name"]) for row in rows)))
        for column in columns:
            table.add_column("time" if column == "time_ns" else column, justify="right", overflow="fold")
        for row in rows:
            # Text, not str: a message may hold what Rich would take for markup.
            name = Text.assemble(row["name"], (f"  {row['error']}" if row["error"] else "", "red"))
            targets = row["targets"]
            table.add_row(name, *(_cell(column, row["figures"].get(column), targets.get(column)) for column in columns))
        console(_PIPE_WIDTH).print(table, Text())
    if any(row["targets"] for row in runs):
        missed = sum(not target["met"] for row in runs for target in row["targets"].values())
        count = sum(len(row["targets"]) for row in runs)
        print(f"{count - missed} of {count} targets met (in brackets; set on another machine, so a guide on this one)")


def _cell(figure: str, value: float | None, target: Mapping[str, Any] | None) -> Text:
    if value is None:
        return Text("-", style="dim")
    text = Text(_format(figure, value))
    if target is not None:
        sign = ">=" if target["at_least"] else "<="
        text.append(f" ({sign} {_format(figure, target['limit'])})", style="green" if target["met"] else "red")
    return text


def _format(figure: str, value: float) -> str:
    if figure == "time_ns":
        return _seconds(value / 1e9)
    if figure in _IN_SECONDS:
        return _seconds(value)
    if value >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"
