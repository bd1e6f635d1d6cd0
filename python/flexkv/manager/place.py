"""Where a manager and its ranks meet: which node, and under which name.

They share nothing but the text of a port, as the original's do; here it names a node's socket in the private runtime
directory, or an engine at a daemon.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from flexkv.config import Settings, load, untold

logger = logging.getLogger("flexkv.manager")

DEFAULT_PORT = "ipc:///tmp/flexkv_server"
_SUFFIX = "_gpu_register"


@dataclass(frozen=True)
class Place:
    """`mode`: "embedded" (the manager's process has the node) or "daemon" (`flexkv serve`)."""

    mode: str
    runtime_dir: str
    node_name: str
    engine_id: str


def gpu_register_port(server_recv_port: str) -> str:
    return (server_recv_port or DEFAULT_PORT) + _SUFFIX


def ranked_port(port: str, rank: int, rank_count: int) -> str:
    """The port for one rank whose number its KVTPClient is not told."""
    return f"{port}?rank={rank}&ranks={rank_count}"


def rank_of(port: str) -> tuple[int, int] | None:
    """Rank and number of ranks, where the port says them."""
    query = parse_qs(port.partition("?")[2])
    if "rank" not in query or "ranks" not in query:
        return None
    return int(query["rank"][0]), int(query["ranks"][0])


def meeting_place(settings: Settings, register_port: str, dp_client_id: int) -> Place:
    target = settings.node_target
    name = _name_of(register_port)
    engine_id = f"{name}.{dp_client_id}"
    if target.mode == "daemon":
        return Place("daemon", target.runtime_dir, target.name, engine_id)
    return Place("embedded", target.runtime_dir, name, engine_id)


def load_settings(told: dict[str, Any] | None = None) -> Settings:
    """FlexKV's settings, those that were passed in code above the file and the environment. Raises ConfigError."""
    settings = load(extra=told or {}, extra_origin="CacheConfig")
    for warning in untold(settings):
        logger.warning("%s", warning)
    return settings


def _name_of(port: str) -> str:
    """As a file name: equal ports give equal names, and others others."""
    text = port.partition("?")[0].removesuffix(_SUFFIX)
    last = re.sub(r"[^A-Za-z0-9_-]+", "-", text.rpartition("/")[2]).strip("-")[:40]
    return f"{last}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
