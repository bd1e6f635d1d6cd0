"""`flexkv bench cluster`: the simulated cluster of `flexkv-bench cluster`, which prints its figures itself."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import typer

from flexkv.cli.run_bench import program


def run(trace: Path, options: Mapping[str, object], as_json: bool) -> None:
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    command = [str(program()), "cluster", str(trace), *given, *(["--json"] if as_json else [])]
    if code := subprocess.run(command, check=False).returncode:
        raise typer.Exit(code)
