"""Whether a reset has reached the cluster of the node that was asked for it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexkv.cli.common import require_core
from flexkv.status_fields import mapping

# A node asks Redis at once, and hears of it in its next look.
_PATIENCE_SECONDS = 5.0
_LOOK_SECONDS = 0.05


def cluster_of(path: Path) -> Mapping[str, Any]:
    """Of the node at that socket; empty: it is in none. Raises RuntimeError: it does not answer."""
    return mapping(json.loads(require_core().query_status(str(path))), "cluster")


def not_told(path: Path, before: Mapping[str, Any]) -> str | None:
    """After a reset: None once the cluster knows of it, else why it does not. `before`: cluster_of() before it.
    Raises RuntimeError: the node does not answer."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        cluster = cluster_of(path)
        directory = mapping(cluster, "directory")
        # An epoch that is larger by a reset of somebody else's will do: it forgets as much.
        if directory.get("epoch", 0) > mapping(before, "directory").get("epoch", 0):
            return None
        if not cluster.get("address"):
            return "its cluster is off at this node (see flexkv status): the other nodes were not told"
        if directory.get("left"):
            return "it has left its cluster (flexkv drain), so the other nodes were not told: reset one of them"
        if time.monotonic() > deadline:
            why = directory.get("trouble") or "Redis has not answered yet"
            return f"its cluster does not know of the reset yet ({why}): keep this node running, it tells when it can"
        time.sleep(_LOOK_SECONDS)
