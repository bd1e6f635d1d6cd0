"""On what a request's KV depends besides its tokens, and which requests cannot be told apart by what we are told."""

from __future__ import annotations

from typing import Any

# Inputs that are not in the tokens, in the engine's own requests and in those of its Python side.
_BESIDE_TOKENS = (
    *("multimodal_hashes", "multimodal_positions", "multimodal_embedding", "py_multimodal_data"),
    *("prompt_embedding_table", "input_token_extra_ids", "encoder_unique_tokens"),
)


def unsupported(request: Any) -> str:
    """Why nothing of this request may be kept or served; empty: it may."""
    for name in _BESIDE_TOKENS:
        value = getattr(request, name, None)
        if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
            return f"it has inputs besides its tokens ({name})"
    return ""


def namespace(request: Any, process: str) -> list[str]:
    """Parts of every key of the request. `process`: of this engine alone, and other after a restart."""
    parts = []
    # A number that stands for other weights in another process: its path is not told at lookups.
    if (adapter := getattr(request, "lora_task_id", None)) is not None:
        parts += ["lora", process, str(adapter)]
    for name in ("cache_salt", "cache_salt_id"):
        if (salt := getattr(request, name, None)) is not None:
            parts += [name, str(salt)]
    return parts


def is_salted(parts: list[str]) -> bool:
    return "cache_salt" in parts or "cache_salt_id" in parts
