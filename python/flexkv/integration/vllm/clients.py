"""The scheduler side's way to its node: started here or found, and a client for each KV cache group."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from flexkv.config import Settings
from flexkv.integration.common.setup import open_node, wait_until_served
from flexkv.integration.vllm import identity
from flexkv.integration.vllm.groups import Group

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("flexkv.vllm")


def open_clients(config: VllmConfig, settings: Settings, groups: list[Group]) -> tuple[list[Any], Any, Any]:
    """(a client for each group, the node if it is this process's own, its metrics if it shows any). Waits a moment for the
    node to know the engine's ranks."""
    if (why := identity.only_here(config)) is not None:
        logger.warning("FlexKV: what this engine keeps is found by this process alone: %s", why)
    digest = identity.fingerprint(config, settings.namespace)
    engine_id, model = identity.engine_id(config), identity.model_name(config)
    ranks = identity.rank_count(config)
    # What computing a block anew would cost: for a state, and for a tail, it is all that precedes it.
    tokens = {g.index: 0 if g.at_boundaries else g.block_tokens for g in groups}
    who = [(g.engine_id(engine_id), ranks, g.model_name(model), g.fingerprint(digest), tokens[g.index]) for g in groups]
    opened = open_node(settings, identity.embedded_node_name(config), who, logger)
    wait_until_served(opened.socket, {client[0] for client in who})
    return opened.clients, opened.node, opened.metrics
