"""Settings of an engine: FlexKV's own sources, and above them `kv_connector_extra_config`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flexkv.config import Settings, load

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("flexkv.vllm")


def load_settings(config: VllmConfig) -> Settings:
    transfer = config.kv_transfer_config
    extra = {key.removeprefix("flexkv."): value for key, value in (transfer.kv_connector_extra_config or {}).items()}
    settings = load(extra=extra, extra_origin="kv_connector_extra_config")
    _show_our_logs(settings)
    for warning in settings.warnings:
        logger.warning("FlexKV: %s", warning)
    if getattr(transfer, "kv_load_failure_policy", "recompute") != "recompute":
        logger.warning(
            'FlexKV: kv_load_failure_policy is "%s": a request whose cached KV cannot be loaded (a node that died, a '
            'deadline) will end with an error. Set "kv_load_failure_policy": "recompute" in --kv-transfer-config, and '
            "it is computed instead.",
            transfer.kv_load_failure_policy,
        )
    return settings


def _show_our_logs(settings: Settings) -> None:
    """vLLM configures only its own loggers; without this nobody would see ours."""
    root = logging.getLogger("flexkv")
    root.setLevel(settings.log_level.upper())
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(
            logging.Formatter(f"%(levelname).1s %(asctime)s [{settings.logging_prefix} %(process)d] %(message)s")
        )
        root.addHandler(handler)
        root.propagate = False
