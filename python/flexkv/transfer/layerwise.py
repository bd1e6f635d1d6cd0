"""Where the original keeps it: the socket over which an engine hands over its eventfds, one for each layer."""

from __future__ import annotations

import os
from typing import Any

from flexkv.config import load


def build_layerwise_eventfd_socket_path(dp_client_id: int, pp_rank: int, model_config: Any) -> str:
    """One for each manager and pipeline stage: FLEXKV_LAYERWISE_EVENTFD_SOCKET, or in the runtime directory."""
    base = os.environ.get("FLEXKV_LAYERWISE_EVENTFD_SOCKET") or os.path.join(load().runtime_dir, "layerwise.sock")
    stem, extension = os.path.splitext(base)
    if model_config.pp_size > 1:
        stem += f"_pp{pp_rank}"
    if model_config.dp_size > 1:
        stem += f"_dp{dp_client_id}"
    return stem + extension
