"""The node that the ranks of one engine share, and each rank's stores of pages there."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from flexkv import _core
from flexkv.config import Settings, load, untold
from flexkv.integration.common.setup import OpenNode, open_node, plain_errors, show_our_logs, wait_until_served
from flexkv.integration.sglang import config as engine
from flexkv.integration.sglang.pages import NodePlace, PageStore, open_agent
from flexkv.integration.sglang.pools import Pool
from flexkv.manager.place import gpu_register_port, meeting_place
from flexkv.node_sockets import somebody_listens

logger = logging.getLogger("flexkv.sglang")

_opened = itertools.count()  # of this process: one that is opened again is not taken for the one before


def load_settings(extra: dict[str, Any], origin: str) -> Settings:
    """FlexKV's settings, those of the door's own configuration above file and environment. Raises ConfigError."""
    with plain_errors(logger):
        settings = load(extra=extra, extra_origin=origin)
    show_our_logs(settings.log_level, settings.logging_prefix)
    for warning in untold(settings):
        logger.warning("FlexKV: %s", warning)
    return settings


def open_stores(
    settings: Settings, server_args: Any, pools: Sequence[Pool], facts: Mapping[str, Any], from_drives: bool = False
) -> tuple[OpenNode, dict[str, PageStore]]:
    """One for each pool of this rank, by name. `facts`: on what the bytes of a page depend, besides its hash, the model
    and the pool. Raises as open_node()."""
    from sglang.srt.configs.model_config import ModelConfig

    place = meeting_place(settings, gpu_register_port(engine.engine_port(server_args)), 0)
    model = engine.identity(ModelConfig.from_server_args(server_args), server_args)
    who, places = [], []
    itself = f"{place.engine_id}.{os.getpid()}.{next(_opened)}"
    for pool in pools:
        name = f"{itself}.{pool.name}"
        told = {**facts, "model": model, "namespace": settings.namespace, "pool": [pool.name, pool.block_slots]}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()
        who.append((name, 1, f"{server_args.model_path} ({pool.name})", digest, pool.block_slots))
        places.append(NodePlace(place.runtime_dir, place.node_name, name))
    node = _join(settings, place.node_name, who)
    stores = {
        pool.name: PageStore(client, open_agent(where, pool, settings), pool, from_drives)
        for pool, where, client in zip(pools, places, node.clients, strict=True)
    }
    wait_until_served(node.socket, {one[0] for one in who})
    return node, stores


def _join(settings: Settings, name: str, who: Sequence[tuple[Any, ...]]) -> OpenNode:
    """The daemon, or the engine's own node: the rank that comes first holds it, the others join."""
    try:
        return open_node(settings, name, who, logger)
    except RuntimeError:
        runtime_dir = settings.node_target.runtime_dir
        socket = f"{runtime_dir}/{name}.sock"
        if not somebody_listens(socket):
            raise
        return OpenNode(socket, [_core.Client.remote(runtime_dir, name, *client) for client in who])
