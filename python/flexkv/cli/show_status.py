"""`flexkv status`: asks every node of this machine and shows what it says."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from flexkv.cli.common import EXIT_FAILED, EXIT_NO_NODE, console, load_settings, print_json, require_core
from flexkv.cli.no_node import no_node
from flexkv.cli.status_tables import node_view
from flexkv.node_sockets import CannotRead, node_sockets, somebody_listens
from flexkv.status_fields import mapping


@dataclass
class Report:
    """What was found in one round: the status of each node, and live sockets that gave none."""

    runtime_dir: str
    name: str | None = None  # only the node of this name
    nodes: list[dict[str, Any]] = field(default_factory=list)
    unreachable: list[dict[str, str]] = field(default_factory=list)
    taken_at: float = field(default_factory=time.monotonic)

    @property
    def exit_code(self) -> int:
        if self.nodes:
            return 0
        return EXIT_FAILED if self.unreachable else EXIT_NO_NODE


def run(as_json: bool, watch: float | None, name: str | None, config: Path | None) -> None:
    target = load_settings(config).node_target
    if watch is not None:
        _watch(as_json, watch, target.runtime_dir, name)
        return
    report = ask_all(target.runtime_dir, name)
    if as_json:
        print_json(_as_json(report))
    else:
        if report.nodes:
            console().print(_view(report, None))
        else:
            typer.echo(f"{no_node(report.runtime_dir, name)}\n" if not report.unreachable else "", nl=False)
        for one in report.unreachable:
            typer.echo(f"flexkv: {_unreachable(one)}", err=True)
    raise typer.Exit(report.exit_code)


def ask_all(runtime_dir: str, name: str | None) -> Report:
    report = Report(runtime_dir, name)
    try:
        paths = node_sockets(runtime_dir, name)
    except CannotRead as error:
        report.unreachable.append({"socket": runtime_dir, "error": str(error)})
        return report
    for path in paths:
        core = require_core()
        try:
            status = json.loads(core.query_status(str(path)))
            if not isinstance(status, dict):
                raise TypeError("its status is not a JSON object")
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            # A node that was killed leaves its socket behind: nobody is there, which is no error.
            if somebody_listens(path):
                report.unreachable.append({"socket": str(path), "error": str(error) or type(error).__name__})
        else:
            report.nodes.append(status)
    return report


def _watch(as_json: bool, interval: float, runtime_dir: str, name: str | None) -> None:
    previous: Report | None = None
    live = Live(console=console(), auto_refresh=False) if sys.stdout.isatty() and not as_json else None
    try:
        if live is not None:
            live.start()
        while True:
            report = ask_all(runtime_dir, name)
            if as_json:
                print(json.dumps(_as_json(report)), flush=True)
            elif live is not None:
                live.update(_view(report, previous), refresh=True)
            else:
                console().print(_view(report, previous))
                sys.stdout.flush()
            previous = report
            time.sleep(interval)
    except KeyboardInterrupt:
        pass
    finally:
        if live is not None:
            live.stop()


def _as_json(report: Report) -> dict[str, Any]:
    return {"nodes": report.nodes, "unreachable": report.unreachable}


def _view(report: Report, previous: Report | None) -> RenderableType:
    parts: list[RenderableType] = []
    for status in report.nodes:
        before = _same_node(status, previous) if previous is not None else None
        seconds = report.taken_at - previous.taken_at if previous is not None else 0.0
        parts.append(node_view(status, before, seconds))
    parts += (Text(_unreachable(one), style="red") for one in report.unreachable)
    return Group(*parts) if parts else Text(no_node(report.runtime_dir, report.name))


def _unreachable(one: Mapping[str, str]) -> str:
    where = one["socket"]
    return one["error"] if where in one["error"] else f"{where}: {one['error']}"


def _same_node(status: Mapping[str, Any], report: Report) -> Mapping[str, Any] | None:
    node = mapping(status, "node")
    for other in report.nodes:
        candidate = mapping(other, "node")
        # With the pid: a node that was started anew counts from zero.
        if (candidate.get("name"), candidate.get("pid")) == (node.get("name"), node.get("pid")):
            return other
    return None
