"""`flexkv reset`: makes nodes forget what they hold."""

from __future__ import annotations

from pathlib import Path

import typer

from flexkv.cli.cluster_resets import cluster_of, not_told, other_machines_not_reset, reset_node
from flexkv.cli.common import EXIT_FAILED, EXIT_NO_NODE, fail, load_settings, require_core
from flexkv.cli.no_node import no_node
from flexkv.node_sockets import CannotRead, node_sockets


def run(name: str | None, config: Path | None) -> None:
    runtime_dir = load_settings(config).node_target.runtime_dir
    try:
        paths = node_sockets(runtime_dir, name)
    except CannotRead as error:
        fail(error)
    require_core()
    done, failed = 0, 0
    for path in paths:
        try:
            cluster = cluster_of(path)
            reset = reset_node(path)
            problems = other_machines_not_reset(path)
            if cluster and (why := not_told(path, reset)):
                problems.append(why)
            if problems:
                raise RuntimeError(f"has forgotten all blocks, but {'; '.join(problems)}")
        except (RuntimeError, ValueError) as error:
            typer.echo(f"flexkv: {path}: {error}", err=True)
            failed += 1
        else:
            typer.echo(f"node {path.stem} has forgotten all blocks")
            done += 1
    if failed:
        raise typer.Exit(EXIT_FAILED)
    if not done:
        fail(no_node(runtime_dir, name), EXIT_NO_NODE)
