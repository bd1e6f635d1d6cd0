"""`flexkv disk check` and `flexkv disk clear`: the files of the SSD tier."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from flexkv.cli import disk_scrub
from flexkv.cli.common import EXIT_FAILED, load_settings, print_json, require_core
from flexkv.config import Settings
from flexkv.config.sizes import MIB, PIB, format_size, parse_size

_CORE_ERRORS = (RuntimeError, OSError, ValueError)


def check(directories: list[str], rate: str | None, as_json: bool, config: Path | None) -> None:
    bytes_per_second = _rate(rate)
    settings = load_settings(config)
    paths = _directories(directories, settings)
    core = require_core()
    results = _check_all(core, paths, bytes_per_second, settings.node_target.runtime_dir, as_json)
    if as_json:
        print_json({"directories": results})
    else:
        for result in results:
            _print_result(result)
    raise typer.Exit(EXIT_FAILED if any(_is_bad(result) for result in results) else 0)


def clear(directories: list[str], yes: bool, config: Path | None) -> None:
    paths = [path for path in _directories(directories, load_settings(config)) if _exists(path)]
    if not paths:
        typer.echo("There is no SSD cache.")
        return
    core = require_core()
    failed = False
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            found[path] = core.disk_contents(path)
        except _CORE_ERRORS as error:
            failed = True
            typer.echo(f"flexkv: {path}: {error}", err=True)
    if found and not yes:
        for path, contents in found.items():
            typer.echo(f"{path}: {format_size(contents['bytes'])}{_foreign(contents)}")
        typer.confirm("Remove all blocks there?", abort=True)
    for path in found:
        try:
            typer.echo(f"{path}: {format_size(core.disk_clear(path))} freed")
        except _CORE_ERRORS as error:
            failed = True
            typer.echo(f"flexkv: {path}: {error}", err=True)
    raise typer.Exit(EXIT_FAILED if failed else 0)


def split_directories(given: Iterable[str]) -> list[str]:
    """Directories from the command line: several with `;` in one argument, relative ones too."""
    parts = (part.strip() for argument in given for part in argument.split(";"))
    return [os.path.abspath(os.path.expanduser(part)) for part in parts if part]


def _directories(given: list[str], settings: Settings) -> list[str]:
    if given:
        return list(dict.fromkeys(split_directories(given)))
    return list(settings.ssd_cache_dir)


def _rate(text: str | None) -> int:
    """Bytes a second; 0: none was given."""
    if text is None:
        return 0
    try:
        rate = parse_size(text.strip().removesuffix("/s"), MIB)
    except ValueError:
        rate = 0
    if not 0 < rate <= PIB:
        raise typer.BadParameter(f"{text!r} is no rate; give one such as 500MB or 1GB", param_hint="--rate")
    return rate


def _exists(path: str) -> bool:
    return os.path.isdir(path)


def _check_all(
    core: Any, paths: list[str], bytes_per_second: int, runtime_dir: str, quiet: bool
) -> list[dict[str, Any]]:
    users = disk_scrub.users(core, runtime_dir)
    scrubbed: dict[Path, dict[str, Any]] = {}  # by the socket of the node
    results = []
    for path in paths:
        socket = users.get(os.path.realpath(path))
        if socket is None:
            results.append(_check_one(core, path, bytes_per_second, quiet))
            continue
        if socket not in scrubbed:
            scrubbed[socket] = _scrub(core, socket, bytes_per_second, quiet)
        found = scrubbed[socket]
        results.append({"directory": path} | found.get(os.path.realpath(path), found))
    return results


def _scrub(core: Any, socket: Path, bytes_per_second: int, quiet: bool) -> dict[str, Any]:
    """By directory; or the error alone."""
    try:
        with ExitStack() as stack:
            progress = _progress(stack, f"node {socket.stem}", quiet)
            return disk_scrub.scrub(core, socket, bytes_per_second or disk_scrub.GENTLE_BYTES_PER_SECOND, progress)
    except _CORE_ERRORS as error:
        return {"error": str(error) or type(error).__name__}


def _check_one(core: Any, path: str, bytes_per_second: int, quiet: bool) -> dict[str, Any]:
    if not _exists(path):
        return {"directory": path, "error": "there is no such directory"}
    try:
        contents = core.disk_contents(path)
        with ExitStack() as stack:
            report: dict[str, Any] = core.disk_check(path, bytes_per_second, _progress(stack, path, quiet))
        return {"directory": path, "foreign": contents["foreign"], "foreign_count": contents["foreign_count"]} | report
    except _CORE_ERRORS as error:
        return {"directory": path, "error": str(error) or type(error).__name__}


def _progress(stack: ExitStack, path: str, quiet: bool) -> Callable[[int, int], None]:
    """What the core calls with the bytes done and those in all. Without a terminal it does nothing, but lets Ctrl-C
    in: Python handles signals only when it runs."""
    error_console = Console(stderr=True)
    if quiet or not error_console.is_terminal:
        return lambda done, total: None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    bar = stack.enter_context(
        Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=error_console, transient=True)
    )
    task = bar.add_task(path.replace("[", r"\["), total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def _is_bad(result: dict[str, Any]) -> bool:
    bad = any(result.get(key) for key in ("error", "bad_blocks", "unreadable_blocks", "unchecked_blocks", "problems"))
    return bad or result.get("state", "done") != "done"


def _print_result(result: dict[str, Any]) -> None:
    path = result["directory"]
    if "error" in result:
        typer.echo(f"flexkv: {path}: {result['error']}", err=True)
        return
    counts = [f"{result.get('blocks', 0):,} blocks ({format_size(result.get('bytes', 0))}) checked"]
    for key, what in (
        ("bad_blocks", "bad"),
        ("unreadable_blocks", "unreadable"),
        ("unchecked_blocks", "not checked as the drive was off or busy"),
    ):
        if result.get(key):
            counts.append(f"{result[key]:,} {what}")
    if result.get("state", "done") != "done":
        counts.append("then it was stopped")
    if result.get("closed_bytes"):
        counts.append(f"{format_size(result['closed_bytes'])} of models not in use left out")
    typer.echo(f"{path}: {', '.join(counts)}{'' if _is_bad(result) else ', all good'}{_foreign(result)}")
    for problem in result.get("problems", []):
        typer.echo(f"flexkv: {path}: {problem}", err=True)


def _foreign(contents: dict[str, Any]) -> str:
    """What else lies there: nothing of it is read or removed."""
    count = contents.get("foreign_count", 0)
    if not count:
        return ""
    names = ", ".join(contents["foreign"]) + (", ..." if count > len(contents["foreign"]) else "")
    return f"; {count:,} not of FlexKV, left alone: {names}"
