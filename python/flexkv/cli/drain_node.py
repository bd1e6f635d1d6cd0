"""`flexkv drain`: has nodes end their work without a loss, and waits for that."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from flexkv.cli.common import EXIT_FAILED, load_settings, print_json, require_core
from flexkv.cli.no_node import sockets_of_nodes
from flexkv.status_fields import mapping, number, undone

_LOOK_AGAIN_S = 0.1
# For Redis to be told: a node that tells nobody of blocks may be drained sooner than that.
_FAREWELL_S = 2.0
# Without a terminal a line says how far it is, so often at most.
_LINE_S = 5.0


def run(name: str | None, timeout: float | None, as_json: bool, config: Path | None) -> None:
    settings = load_settings(config)
    paths = sockets_of_nodes(settings.node_target.runtime_dir, name)
    seconds = settings.drain_timeout_seconds if timeout is None else timeout
    results = _drain_all(paths, seconds)
    if as_json:
        print_json({"nodes": results})
    for result in results:
        if not as_json and "error" not in result:
            typer.echo(f"node {result['node']} is drained{_given(result)}: stop it, or start it anew to use it again")
        for problem in (result.get("error"), result.get("warning")):
            if problem:
                typer.echo(f"flexkv: node {result['node']}: {problem}", err=True)
    raise typer.Exit(EXIT_FAILED if any("error" in result for result in results) else 0)


def _drain_all(paths: list[Path], seconds: float) -> list[dict[str, Any]]:
    core = require_core()
    results: list[dict[str, Any]] = [{"node": path.stem} for path in paths]
    # All of them begin before any is waited for.
    for path, result in zip(paths, results, strict=True):
        try:
            core.drain(str(path), seconds)
        except (RuntimeError, OSError) as error:
            result["error"] = str(error) or type(error).__name__
    with ExitStack() as stack:
        tell = _progress(stack)
        for path, result in zip(paths, results, strict=True):
            if "error" not in result:
                try:
                    result |= _wait(core, path, seconds, tell)
                except (RuntimeError, OSError, ValueError) as error:
                    result["error"] = f"it ended before it was drained, or does not answer ({error})"
    return results


def _wait(core: Any, path: Path, seconds: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """What became of one of them."""
    drained_at: float | None = None
    while True:
        status = json.loads(core.query_status(str(path)))
        drain = mapping(mapping(status, "node"), "drain")
        cluster = mapping(status, "cluster")
        left = not cluster.get("address") or bool(mapping(cluster, "directory").get("left"))
        if drain.get("state") == "late":
            return {"drain": drain, "error": f"after {seconds:g} s there is still something left: {undone(drain)}"}
        if drain.get("state") == "drained":
            drained_at = drained_at or time.monotonic()
            if left:
                return {"drain": drain}
            if time.monotonic() > drained_at + _FAREWELL_S:
                return {"drain": drain, "warning": _not_told(cluster)}
        tell(f"node {path.stem} drains{_given({'drain': drain})}: {undone(drain)}")
        time.sleep(_LOOK_AGAIN_S)


def _given(result: Mapping[str, Any]) -> str:
    blocks = number(mapping(result, "drain"), "offered_blocks")
    return f", and the remote tier was offered {blocks:,.0f} blocks of it" if blocks else ""


def _not_told(cluster: Mapping[str, Any]) -> str:
    why = mapping(cluster, "directory").get("trouble") or "Redis does not answer"
    return (
        f"its cluster could not be told ({why}): until node_ttl_seconds are over, others ask it for blocks, in vain, "
        "and then read or compute them elsewhere"
    )


def _progress(stack: ExitStack) -> Callable[[str], None]:
    console = Console(stderr=True)
    if console.is_terminal:
        shown = stack.enter_context(console.status(""))
        return lambda text: shown.update(text.replace("[", r"\["))
    next_line = time.monotonic() + _LINE_S

    def line(text: str) -> None:
        nonlocal next_line
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + _LINE_S
            typer.echo(text, err=True)

    return line
