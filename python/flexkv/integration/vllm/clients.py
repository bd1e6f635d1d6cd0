"""The scheduler side's way to its node: started here or found, and a client for each KV cache group."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from flexkv import _core
from flexkv.config import Settings
from flexkv.integration.vllm import identity
from flexkv.integration.vllm.groups import Group
from flexkv.integration.vllm.setup import plain_errors, wait_until_served
from flexkv.metrics import start_metrics
from flexkv.node_sockets import somebody_listens
from flexkv.node_start import start_node

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("flexkv.vllm")


def open_clients(config: VllmConfig, settings: Settings, groups: list[Group]) -> tuple[list[Any], Any, Any]:
    """(a client for each group, the node if it is this process's own, its metrics if it shows any). Waits a moment for the
    node to know the engine's ranks."""
    target = settings.node_target
    digest = identity.fingerprint(config, settings.namespace)
    engine_id, model = identity.engine_id(config), identity.model_name(config)
    ranks = identity.rank_count(config)
    who = [(g.engine_id(engine_id), ranks, g.model_name(model), g.fingerprint(digest), g.block_tokens) for g in groups]
    if target.mode != "daemon":
        node_name = identity.embedded_node_name(config) if target.mode == "embedded" else target.name
        try:
            with plain_errors():
                node = start_node(_core, settings, target.mode, node_name)
        except RuntimeError:
            if target.mode == "embedded":
                raise
        else:
            logger.info("FlexKV: %s", node.describe())
            metrics = None
            if settings.enable_metrics:
                metrics = start_metrics(
                    settings.metrics_port, lambda: json.loads(node.status()), settings.origin("metrics_port")
                )
            clients = [_core.Client.embedded(node, *client) for client in who]
            wait_until_served(node.socket_path(), {client[0] for client in who})
            return clients, node, metrics
    if not somebody_listens(target.socket):
        logger.warning(
            "FlexKV: node '%s' is not running (looked for %s); serving without it until it comes",
            *(target.name, target.socket),
        )
    clients = [_core.Client.remote(target.runtime_dir, target.name, *client) for client in who]
    wait_until_served(target.socket, {client[0] for client in who})
    return clients, None, None
