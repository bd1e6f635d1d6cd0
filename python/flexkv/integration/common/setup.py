"""What an adapter does at the start of its engine: tell wrong settings, show our logs, start or find the node."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flexkv import _core
from flexkv.config import ConfigError, Settings
from flexkv.logs import formatter
from flexkv.metrics import start_metrics
from flexkv.node_sockets import somebody_listens
from flexkv.node_start import start_node

ATTACH_SECONDS = 2.0


@contextmanager
def plain_errors(logger: logging.Logger) -> Iterator[None]:
    """A wrong setting ends the engine, whose traceback is long: first a line of ours for each problem."""
    try:
        yield
    except ConfigError as error:
        show_our_logs("info", "FLEXKV")
        for problem in error.problems:
            logger.error("FlexKV: %s", problem)
        raise


def show_our_logs(level: str, prefix: str) -> None:
    """Engines configure only their own loggers; without this nobody would see ours."""
    root = logging.getLogger("flexkv")
    root.setLevel(level.upper())
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(formatter(prefix))
        root.addHandler(handler)
        root.propagate = False


def wait_until_served(socket: str, engine_ids: set[str]) -> None:
    """At the start of the engine, until its node has heard of all its ranks: nothing that is computed before is kept.
    For a moment, as it is a matter of milliseconds; an engine whose node is not there serves without it."""
    deadline = time.monotonic() + ATTACH_SECONDS
    while time.monotonic() < deadline:
        try:
            engines = json.loads(_core.query_status(socket))["engines"]
            if engine_ids <= {engine["id"] for engine in engines if engine["state"] == "ready"}:
                return
        except (RuntimeError, ValueError, KeyError, TypeError):
            return
        time.sleep(0.01)


@dataclass
class OpenNode:
    """Clients of the node that the settings name, and the node itself where it is this process's own."""

    socket: str
    clients: list[Any]
    node: Any = None
    metrics: Any = None

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
        for client in self.clients:
            client.close()
        if self.node is not None:
            self.node.stop()


def open_node(settings: Settings, own_name: str, who: Sequence[tuple[Any, ...]], logger: logging.Logger) -> OpenNode:
    """`own_name`: of an embedded node; `who`: what each client says of itself. Waits for no rank. Raises ConfigError, and
    RuntimeError where an embedded node cannot be started."""
    target = settings.node_target
    state = f"is not running (looked for {target.socket})"
    if target.mode != "daemon":
        try:
            with plain_errors(logger):
                node = start_node(_core, settings, target.mode, own_name if target.mode == "embedded" else target.name)
        except RuntimeError as error:
            if target.mode == "embedded":
                raise
            state = f"does not listen yet ({error})"
        else:
            logger.info("FlexKV: %s", node.describe())
            metrics = None
            if settings.enable_metrics:
                origin = settings.origin("metrics_port")
                metrics = start_metrics(
                    settings.metrics_port, lambda: json.loads(node.status()), origin, settings.metrics_host
                )
            clients = [_core.Client.embedded(node, *client) for client in who]
            return OpenNode(node.socket_path(), clients, node, metrics)
    if not somebody_listens(target.socket):
        logger.warning("FlexKV: node '%s' %s; serving without it until it comes", *(target.name, state))
    clients = [_core.Client.remote(target.runtime_dir, target.name, *client) for client in who]
    return OpenNode(target.socket, clients)
