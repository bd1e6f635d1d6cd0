"""What the engine's configuration says: its model, on what its KV depends besides the tokens, what we cannot serve.

The configuration is an `ExecutorConfig` (1.1) or a `TorchLlmArgs` (since 1.2), which name many things differently.
"""

from __future__ import annotations

import enum
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexkv.integration.weights import hub_snapshot, weight_files


# Settings lie no deeper; other objects may refer to themselves.
_DEPTH_MAX = 6


@dataclass(frozen=True)
class Engine:
    model: str
    block_tokens: int
    rank_count: int
    facts: Mapping[str, Any]
    # Why it is not served, and what to change; empty: it is.
    refusal: str

    def fingerprint(self, namespace: str) -> bytes:
        """32 bytes that differ whenever equal tokens could have different KV. The layout of the bytes is not in it: the
        workers' memory tells that."""
        facts = {**self.facts, "namespace": namespace}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def read(config: Any) -> Engine:
    model = str(_first(config, "model", "hf_model_dir") or "")
    block_tokens = int(_first(config, "kv_cache_config.tokens_per_block", "tokens_per_block") or 0)
    ranks = int(_first(config, "tensor_parallel_size", "mapping.tp_size") or 1)
    return Engine(model or "unnamed", block_tokens, ranks, _facts(config, model, block_tokens, ranks), _refusal(config))


def _first(config: Any, *paths: str) -> Any:
    """The first of these attributes that is there and not None."""
    for path in paths:
        value = config
        for name in path.split("."):
            value = getattr(value, name, None)
        if value is not None:
            return value
    return None


_REFUSED_IF_ABOVE_ONE = {
    "pipeline parallelism": ("pipeline_parallel_size", "mapping.pp_size"),
    "context parallelism": ("context_parallel_size", "mapping.cp_size"),
    "beam search": ("max_beam_width",),
}
_REFUSED_IF_SET = {
    "attention data parallelism": ("enable_attention_dp", "mapping.enable_attention_dp"),
    # What draft layers keep of a token depends on the one after it.
    "speculative decoding": ("speculative_config", "spec_config"),
    # Its index cache is not in the memory that connectors are told of.
    "sparse attention": ("sparse_attention_config",),
}


def _refusal(config: Any) -> str:
    for what, paths in _REFUSED_IF_ABOVE_ONE.items():
        if int(_first(config, *paths) or 1) > 1:
            return f"{what} is not supported"
    for what, paths in _REFUSED_IF_SET.items():
        if _first(config, *paths):
            return f"{what} is not supported"
    cache = getattr(config, "kv_cache_config", None)
    if _first(config, "kv_cache_config.tokens_per_block", "tokens_per_block") is None:
        return "its configuration does not say how many tokens a block has (kv_cache_config.tokens_per_block)"
    # On by default; it copies parts of blocks before connectors hear of it.
    if getattr(cache, "enable_partial_reuse", False) is not False:
        return "set kv_cache_config.enable_partial_reuse to false"
    if getattr(cache, "enable_block_reuse", True) is False:
        return "set kv_cache_config.enable_block_reuse to true"
    if getattr(cache, "host_cache_size", None):
        return "TensorRT-LLM's own host cache moves blocks unseen: set kv_cache_config.host_cache_size to 0"
    longest = _first(config, "max_seq_len")
    windows = getattr(cache, "max_attention_window", None) or []
    if any(longest is None or window < longest for window in windows):
        return "attention windows (kv_cache_config.max_attention_window) are not supported"
    return ""


def _facts(config: Any, model: str, block_tokens: int, ranks: int) -> dict[str, Any]:
    revision = _first(config, "revision")
    named = ("dtype", "quant_config", "load_format", "model_kwargs")
    facts = {
        "engine": ["tensorrt_llm", _version()],
        "model": model,
        "revision": _plain(revision),
        "weights": weight_files(model),
        "snapshot": hub_snapshot(model, revision) if model else None,
        "block_tokens": block_tokens,
        "ranks": ranks,
        "cache_dtype": _plain(_first(config, "kv_cache_config.dtype", "pytorch_backend_config.kv_cache_dtype")),
        "attention": _plain(_first(config, "attn_backend", "pytorch_backend_config.attn_backend")),
        "arguments": {name: _plain(getattr(config, name, None)) for name in named},
    }
    if not model:
        # Nothing tells this model's KV from another's: it is shared with nobody.
        facts["process"] = os.urandom(16).hex()
    return facts


def _plain(value: Any, depth: int = 0) -> Any:
    """The same for the same setting in every process: no addresses of objects."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    elif not isinstance(value, Mapping) and hasattr(value, "__dict__"):
        value = vars(value)
    if isinstance(value, Mapping) and depth < _DEPTH_MAX:
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    return type(value).__name__


def _version() -> str:
    try:
        return importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
