"""The node that the ranks of one engine share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from flexkv import _core
from flexkv.config import Settings
from flexkv.integration.common.setup import OpenNode, open_node
from flexkv.node_sockets import somebody_listens


def join_node(settings: Settings, name: str, who: Sequence[tuple[Any, ...]], logger: logging.Logger) -> OpenNode:
    """The daemon, or the engine's own node: the rank that comes first holds it, the others join. Raises as open_node()."""
    try:
        return open_node(settings, name, who, logger)
    except RuntimeError:
        runtime_dir = settings.node_target.runtime_dir
        socket = f"{runtime_dir}/{name}.sock"
        if not somebody_listens(socket):
            raise
        return OpenNode(socket, [_core.Client.remote(runtime_dir, name, *client) for client in who])
