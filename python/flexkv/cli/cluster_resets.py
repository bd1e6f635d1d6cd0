"""Whether a reset has reached the cluster of the node that was asked for it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexkv.cli.common import require_core
from flexkv.other_machines import file_of, recall
from flexkv.status_fields import mapping

# A node asks Redis at once, and hears of it in its next look.
_PATIENCE_SECONDS = 5.0
_LOOK_SECONDS = 0.05
# For a node of another machine to be reached, and to forget.
_HOST_SECONDS = 10.0


def cluster_of(path: Path) -> Mapping[str, Any]:
    """Of the node at that socket; empty: it is in none. Raises RuntimeError: it does not answer."""
    return mapping(json.loads(require_core().query_status(str(path))), "cluster")


def reset_node(path: Path) -> str:
    """Has the node forget all blocks; the id of that reset. Raises RuntimeError: it does not answer."""
    status = json.loads(require_core().reset(str(path)))
    return str(mapping(status, "node").get("last_reset") or "")


def not_told(path: Path, reset: str) -> str | None:
    """None once the cluster knows of that reset, or of a later one, else why it does not. Raises RuntimeError: the node
    does not answer."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        cluster = cluster_of(path)
        directory = mapping(cluster, "directory")
        told = directory.get("told_resets")
        # By its id: the epoch's number may be lower than before once Redis came back older.
        if isinstance(told, list) and reset and reset in told:
            return None
        if not cluster.get("address"):
            return "its cluster is off at this node (see flexkv status): the other nodes were not told"
        if time.monotonic() > deadline:
            why = directory.get("trouble") or "Redis has not answered yet"
            return f"its cluster does not know of the reset yet ({why}): keep this node running, it tells when it can"
        time.sleep(_LOOK_SECONDS)


def other_machines_not_reset(path: Path) -> list[str]:
    """Has the nodes forget all blocks, too, that have the other parts of the blocks of this one's engines: what they have
    from before would go together with what is saved anew here. Why that may not be so."""
    try:
        others = recall(path)
    except (OSError, ValueError) as error:
        return [str(error)]
    problems = []
    for other in others:
        try:
            require_core().reset_host(other.secret_file, other.cluster_name, other.address, _HOST_SECONDS)
        except RuntimeError as error:
            problems.append(
                f"the node of an engine's other machine was not told to forget its part ({error}): run `flexkv reset` "
                f"there, or remove {file_of(path)} if no engine of this node has ranks there any more"
            )
    listens = mapping(json.loads(require_core().query_status(str(path))), "node").get("engine_listen")
    if listens and not others:
        problems.append(
            f"it lets in engines of other machines (engine_listen, {listens}), whose other nodes it does not know: run "
            "`flexkv reset` on the first machine of each, which tells all of its nodes"
        )
    return problems
