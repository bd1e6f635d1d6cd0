"""Settings of an engine: FlexKV's own sources, and above them `kv_connector_extra_config`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flexkv.config import Settings, load, untold
from flexkv.integration.common.setup import plain_errors, show_our_logs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("flexkv.vllm")


def load_settings(config: VllmConfig) -> Settings:
    transfer = config.kv_transfer_config
    extra = {key.removeprefix("flexkv."): value for key, value in (transfer.kv_connector_extra_config or {}).items()}
    with plain_errors(logger):
        settings = load(extra=extra, extra_origin="kv_connector_extra_config")
    show_our_logs(settings.log_level, settings.logging_prefix)
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
