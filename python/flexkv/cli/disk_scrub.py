"""`flexkv disk check` of directories that a running node uses: the node checks its blocks, slowly, while it serves."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexkv.config.sizes import MIB
from flexkv.node_sockets import CannotRead, node_sockets
from flexkv.status_fields import entries, mapping, number

GENTLE_BYTES_PER_SECOND = 100 * MIB
_LOOK_AGAIN_S = 0.5


def users(core: Any, runtime_dir: str) -> dict[str, Path]:
    """The directories that nodes of this machine use, as far as they can be seen, and the sockets of these nodes."""
    found: dict[str, Path] = {}
    try:
        sockets = node_sockets(runtime_dir)
    except CannotRead:
        return found
    for socket in sockets:
        try:
            status = json.loads(core.query_status(str(socket)))
        except (RuntimeError, OSError, ValueError):
            continue  # nobody is there any more, or it does not answer: then its directories are refused
        for drive in entries(mapping(status, "disk"), "drives"):
            found[os.path.realpath(str(drive.get("directory")))] = socket
    return found


def scrub(core: Any, socket: Path, bytes_per_second: int, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Has the node check all its blocks and waits for that; Ctrl-C ends it. What was found, by directory (real path)."""
    try:
        status = json.loads(core.scrub(str(socket), bytes_per_second))
        while _state(status) == "running":
            found = mapping(mapping(status, "disk"), "scrub")
            progress(int(_sum(found, "checked_bytes")), int(number(found, "bytes") or 0))
            time.sleep(_LOOK_AGAIN_S)
            status = json.loads(core.query_status(str(socket)))
    except KeyboardInterrupt:
        status = json.loads(core.scrub(str(socket), 0))
    if not mapping(mapping(status, "disk"), "scrub"):
        raise RuntimeError(f"the node at {socket} was started anew meanwhile: check again")
    return _results(status)


def _state(status: Mapping[str, Any]) -> str:
    return str(mapping(mapping(status, "disk"), "scrub").get("state"))


def _sum(scrub: Mapping[str, Any], key: str) -> float:
    return sum(number(drive, key) or 0 for drive in entries(scrub, "drives"))


def _results(status: Mapping[str, Any]) -> dict[str, Any]:
    disk = mapping(status, "disk")
    closed = {str(drive.get("directory")): number(drive, "closed_bytes") for drive in entries(disk, "drives")}
    results = {}
    for drive in entries(mapping(disk, "scrub"), "drives"):
        directory = str(drive.get("directory"))
        results[os.path.realpath(directory)] = {
            "state": _state(status),
            "blocks": number(drive, "checked_blocks"),
            "bytes": number(drive, "checked_bytes"),
            "bad_blocks": number(drive, "damaged_blocks"),
            "unreadable_blocks": number(drive, "unreadable_blocks"),
            "unchecked_blocks": number(drive, "unchecked_blocks"),
            "closed_bytes": closed.get(directory),
        }
    return results
