"""What a command says when the node that it is for does not run."""

from __future__ import annotations

import os
from pathlib import Path

from flexkv.cli.common import EXIT_NO_NODE, fail
from flexkv.node_sockets import CannotRead, node_sockets, somebody_listens

_ROOTS_DIR = "/run/flexkv"


def sockets_of_nodes(runtime_dir: str, name: str | None) -> list[Path]:
    """Of those that the command is for; it ends when there is none."""
    try:
        paths = node_sockets(runtime_dir, name)
    except CannotRead as error:
        fail(error)
    if not paths:
        fail(no_node(runtime_dir, name), EXIT_NO_NODE)
    return paths


def no_node(runtime_dir: str, name: str | None) -> str:
    """What is not there, where that was looked for, and what to do: a line each."""
    what = f"no node named {name} is running" if name else "no node is running"
    running = _running(runtime_dir) if name else []
    if running:
        advice = f"These run: {', '.join(running)}. Give one of them as --name, or none for all."
    else:
        named = f" --name {name}" if name else ""
        advice = f"Start one with `flexkv serve{named}`, or an engine with FlexKV, whose process then holds one."
    text = f"{what} (looked in {runtime_dir}).\n{advice}"
    if os.geteuid() != 0 and runtime_dir != _ROOTS_DIR and os.path.isdir(_ROOTS_DIR):
        text += f"\nNodes that root started are in {_ROOTS_DIR}: run this as root to see them."
    return text


def _running(runtime_dir: str) -> list[str]:
    try:
        return [path.stem for path in node_sockets(runtime_dir) if somebody_listens(path)]
    except CannotRead:
        return []
