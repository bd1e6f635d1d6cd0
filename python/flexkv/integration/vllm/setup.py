"""Settings of an engine: FlexKV's own sources, and above them `kv_connector_extra_config`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flexkv import _core
from flexkv.config import ConfigError, Settings, load, untold
from flexkv.logs import formatter

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("flexkv.vllm")

_ATTACH_SECONDS = 2.0


def load_settings(config: VllmConfig) -> Settings:
    transfer = config.kv_transfer_config
    extra = {key.removeprefix("flexkv."): value for key, value in (transfer.kv_connector_extra_config or {}).items()}
    with plain_errors():
        settings = load(extra=extra, extra_origin="kv_connector_extra_config")
    _show_our_logs(settings.log_level, settings.logging_prefix)
    for warning in untold(settings):
        logger.warning("FlexKV: %s", warning)
    if getattr(transfer, "kv_load_failure_policy", "recompute") != "recompute":
        logger.warning(
            'FlexKV: kv_load_failure_policy is "%s": a request whose cached KV cannot be loaded (a node that died, a '
            'deadline) will end with an error. Set "kv_load_failure_policy": "recompute" in --kv-transfer-config, and '
            "it is computed instead.",
            transfer.kv_load_failure_policy,
        )
    return settings


@contextmanager
def plain_errors() -> Iterator[None]:
    """A wrong setting ends the engine, whose traceback is long: first a line of ours for each problem."""
    try:
        yield
    except ConfigError as error:
        _show_our_logs("info", "FLEXKV")
        for problem in error.problems:
            logger.error("FlexKV: %s", problem)
        raise


def wait_until_served(socket: str, engine_ids: set[str]) -> None:
    """At the start of the engine, until its node has heard of all its ranks: nothing that is computed before is kept. For
    a moment, as it is a matter of milliseconds; an engine whose node is not there serves without it."""
    deadline = time.monotonic() + _ATTACH_SECONDS
    while time.monotonic() < deadline:
        try:
            engines = json.loads(_core.query_status(socket))["engines"]
            if engine_ids <= {engine["id"] for engine in engines if engine["state"] == "ready"}:
                return
        except (RuntimeError, ValueError, KeyError, TypeError):
            return
        time.sleep(0.01)


def _show_our_logs(level: str, prefix: str) -> None:
    """vLLM configures only its own loggers; without this nobody would see ours."""
    root = logging.getLogger("flexkv")
    root.setLevel(level.upper())
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(formatter(prefix))
        root.addHandler(handler)
        root.propagate = False
