"""The scheduler side's way to its node: started here or found, and a client for each KV cache group."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkv import _core
from flexkv.config import Settings
from flexkv.integration.common.setup import ATTACH_SECONDS, open_node, wait_until_served
from flexkv.integration.vllm import identity
from flexkv.integration.vllm.groups import Group
from flexkv.integration.vllm.machines import Machines, machines_of
from flexkv.other_machines import OtherNode, remember

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
    machines = machines_of(config)
    # What computing a block anew would cost: for a state, and for a tail, it is all that precedes it.
    tokens = {g.index: 0 if g.at_boundaries else g.block_tokens for g in groups}
    who = [
        (g.engine_id(engine_id), machines.ranks, g.model_name(model), g.fingerprint(digest), tokens[g.index])
        for g in groups
    ]
    if machines.count > 1:
        return [_of_machines(settings, machines, *client) for client in who], None, None
    opened = open_node(settings, identity.embedded_node_name(config), who, logger)
    wait_until_served(opened.socket, {client[0] for client in who})
    return opened.clients, opened.node, opened.metrics


def _of_machines(settings: Settings, machines: Machines, *who: Any) -> Any:
    engine_id, ranks, model, fingerprint, block_tokens = who
    target = settings.node_target
    fingerprints = [machines.fingerprint(machine, fingerprint) for machine in range(machines.count)]
    secret = (settings.cluster_secret_file, settings.cluster_name)
    others = list(settings.engine_hosts)
    who = (engine_id, ranks, model, fingerprints, block_tokens)
    try:
        known_by = (os.path.abspath(settings.cluster_secret_file), settings.cluster_name)
        remember(Path(target.socket), [OtherNode(address, *known_by) for address in others])
    except (OSError, ValueError) as error:
        # Parts of different weights could be loaded together after a reset that one machine's node alone heard of.
        raise RuntimeError(f"`flexkv reset` would not find the nodes of this engine's other machines: {error}") from error
    client = _core.Client.of_machines(target.runtime_dir, target.name, others, *secret, *who)
    deadline = time.monotonic() + ATTACH_SECONDS
    while not client.served(0) and time.monotonic() < deadline:
        time.sleep(0.01)
    return client
