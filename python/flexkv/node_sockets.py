"""The sockets of this machine's nodes, as far as this user may see them."""

from __future__ import annotations

import os
import socket
from pathlib import Path


class CannotRead(Exception):
    """The runtime directory is another user's. The message says whose."""


def node_sockets(runtime_dir: str, name: str | None = None) -> list[Path]:
    """Those in the directory, live or not; only the one of this name. Raises CannotRead."""
    try:
        names = sorted(os.listdir(runtime_dir))
    except PermissionError:
        raise CannotRead(f"cannot read {runtime_dir}: it belongs to {_owner(runtime_dir)}; run as that user") from None
    except OSError:
        return []
    paths = [Path(runtime_dir, one) for one in names if one.endswith(".sock")]
    return [path for path in paths if name is None or path.stem == name]


def somebody_listens(path: str | os.PathLike[str]) -> bool:
    """Whether a live process has this socket. True also where that cannot be told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return True


def _owner(directory: str) -> str:
    # What lies in a directory that may not be searched is not seen: then that directory's owner is meant.
    for path in (Path(directory), *Path(directory).parents):
        try:
            info = path.stat()
        except OSError:
            continue
        try:
            return path.owner()
        except KeyError:
            return f"uid {info.st_uid}"
    return "another user"
