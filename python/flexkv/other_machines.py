"""Which nodes of other machines have parts of the blocks of a node's engines: written beside the node's socket by the
scheduler that asks them (docs/operations/several_machines.md), read by `flexkv reset`. It outlives both, as the blocks do."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SUFFIX = ".machines"


@dataclass(frozen=True, order=True)
class OtherNode:
    address: str  # HOST:PORT, where it lets schedulers in
    secret_file: str
    cluster_name: str


def file_of(socket: Path) -> Path:
    """Beside that node's socket."""
    return socket.with_suffix(_SUFFIX)


def remember(socket: Path, nodes: Iterable[OtherNode]) -> None:
    """Besides those that are known. Raises OSError and ValueError."""
    file = file_of(socket)
    with _locked(file.parent):  # two schedulers may start at once
        known = set(recall(socket))
        if known.issuperset(nodes := set(nodes)):
            os.utime(file)  # in /tmp, what nobody touches for long is cleared away
            return
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_text(json.dumps([asdict(one) for one in sorted(known | nodes)]))
        new.replace(file)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def recall(socket: Path) -> list[OtherNode]:
    """Raises OSError and ValueError, which name the file."""
    file = file_of(socket)
    try:
        told: Any = json.loads(file.read_text())
        return [OtherNode(str(one["address"]), str(one["secret_file"]), str(one["cluster_name"])) for one in told]
    except FileNotFoundError:
        return []
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{file} cannot be read: remove it, and reset the engines' other machines there") from None
