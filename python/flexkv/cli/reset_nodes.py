"""`flexkv reset`: makes nodes forget what they hold."""

from __future__ import annotations

from pathlib import Path

import typer

from flexkv.cli.common import EXIT_FAILED, EXIT_NO_NODE, fail, require_core
from flexkv.config import ConfigError, load


def run(name: str | None, config: Path | None) -> None:
    try:
        runtime_dir = load(file=config).node_target.runtime_dir
    except ConfigError as error:
        fail(error)
    core = require_core()
    done, failed = 0, 0
    for path in sorted(Path(runtime_dir).glob("*.sock")):
        if name is not None and path.stem != name:
            continue
        try:
            core.reset(str(path))
        except (RuntimeError, ValueError) as error:
            typer.echo(f"flexkv: {path}: {error}", err=True)
            failed += 1
        else:
            typer.echo(f"node {path.stem} has forgotten all blocks")
            done += 1
    if failed:
        raise typer.Exit(EXIT_FAILED)
    if not done:
        fail(f"no node {'named ' + name + ' ' if name else ''}is running in {runtime_dir}", EXIT_NO_NODE)
