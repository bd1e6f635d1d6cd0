"""`./scripts/demo`: the same conversations through vLLM without FlexKV and with it, compared."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from . import options, report
from .engines import quiet_environment
from .model import DEMO_SHAPE, make_model
from .progress import DemoProgress
from .workload import Request, Workload

_LOG_TAIL_LINES = 40
_PIPE_WIDTH = 120


class RunFailed(Exception):
    """A run that did not complete; the message says why, and where the log is."""


def main(arguments: Sequence[str] | None = None) -> int:
    given = options.parse(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    out, model = Path(given.out), Path(given.model) if given.model else None
    workload = options.workload_of(given)
    try:
        _require_flexkv()
        runs = _play_both(console, workload, model, given, out)
    except (ValueError, RunFailed) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    _show(console, workload, runs, model, out)
    if given.json:
        _save(Path(given.json), workload, runs)
    difference = report.first_difference(*runs)
    tokens = sum(len(request.tokens) for request in runs[0])
    if difference:
        console.print(f"[bold red]Outputs DIFFER[/bold red]: {difference}")
        return 1
    console.print(
        f"[bold green]All outputs equal[/bold green]: {tokens} tokens of {workload.requests} answers, greedy."
    )
    if not any(request.flexkv_tokens for request in runs[1]) and workload.turns > 1:
        console.print("[bold red]FlexKV served nothing[/bold red]: see the log of the run with FlexKV.")
        return 1
    return 0


def _require_flexkv() -> None:
    try:
        import flexkv._core  # noqa: F401  (the compiled part: what a plain checkout on PYTHONPATH lacks)
    except ImportError as error:
        raise RunFailed(f"The flexkv wheel cannot be imported: {error}. `pip install .` in the checkout.") from error


def _play_both(
    console: Console,
    workload: Workload,
    model: Path | None,
    given: argparse.Namespace,
    out: Path,
) -> tuple[report.Run, report.Run]:
    out.mkdir(parents=True, exist_ok=True)
    environment = quiet_environment()
    dtype = given.dtype
    if given.in_process:
        # One OpenMP pool: torch's own and vLLM's would fight for the cores.
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    with DemoProgress(console) as progress:
        if model is None:
            progress.begin("random model", "being made", 1)
            model = make_model(out / "model", DEMO_SHAPE)
            progress.advance("made")
            cache_bytes = 2 * DEMO_SHAPE.kv_bytes_per_token * workload.all_tokens
            # Enough for the workload and no more, unless the user says otherwise.
            environment.setdefault("FLEXKV_CPU_CACHE_GB", f"{max(512, cache_bytes >> 20)}MB")
            dtype = dtype or "float32"
        spec = {
            "model": str(model.resolve()),
            "dtype": dtype or "auto",
            "serve": given.serve,
            "workload": dataclasses.asdict(workload),
        }
        without = _play_one(progress, "without FlexKV", spec | {"flexkv": False}, environment, out / "without.log")
        with_flexkv = _play_one(progress, "with FlexKV", spec | {"flexkv": True}, environment, out / "with.log")
    return without, with_flexkv


def _play_one(progress: DemoProgress, name: str, spec: dict, environment: dict[str, str], log: Path) -> report.Run:
    """One run in a process group of its own, which is gone when this returns."""
    requests = spec["workload"]["conversations"] * spec["workload"]["turns"]
    progress.begin(name, "vLLM starts", requests)
    reader, writer = os.pipe()
    with log.open("wb") as log_file, os.fdopen(reader) as events:
        process = subprocess.Popen(
            [sys.executable, "-m", "flexkv.demo.runner", json.dumps(spec | {"events": writer})],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[writer],
            start_new_session=True,
        )
        os.close(writer)
        run: report.Run = []
        message = "the engine's process ended"
        try:
            for line in events:
                event = json.loads(line)
                kind = event.pop("event")
                if kind == "ready":
                    progress.say("requests")
                elif kind == "request":
                    run.append(Request(**event))
                    progress.advance("requests")
                elif kind == "error":
                    message = event["message"]
                elif kind == "done":
                    message = ""
            process.wait()
        finally:
            _end_group(process)
    if message:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
        raise RunFailed(f"{tail}\n\nThe run {name} failed: {message}\nWhole log: {log}")
    progress.end()
    return run


def _end_group(process: subprocess.Popen) -> None:
    """Ends what is left of the run's processes: nothing after a good run, everything after Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        for _ in range(50):
            if process.poll() is not None:
                break
            time.sleep(0.1)
    process.wait()


def _show(
    console: Console, workload: Workload, runs: tuple[report.Run, report.Run], model: Path | None, out: Path
) -> None:
    console.print(report.turns_table(workload, *runs))
    for comment in report.comments(workload, *runs):
        console.print(comment, markup=False)
    picture = out / "ttft.png"
    name = model.name if model else "a random llama of 50 million parameters"
    title = f"vLLM with and without FlexKV: {workload.conversations} conversations, {name}"
    report.plot(picture, title, workload, *runs)
    console.print(f"Plot: {picture}. Logs of the engines: {out / 'without.log'}, {out / 'with.log'}.")


def _save(path: Path, workload: Workload, runs: tuple[report.Run, report.Run]) -> None:
    without, with_flexkv = ([dataclasses.asdict(request) for request in run] for run in runs)
    figures = {"workload": dataclasses.asdict(workload), "without": without, "with": with_flexkv}
    path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
