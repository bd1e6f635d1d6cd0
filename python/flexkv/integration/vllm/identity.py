"""Who this engine is, and on what its KV bytes depend besides the tokens: read from vLLM's configuration."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import vllm

from flexkv.integration.weights import hub_snapshot, weight_files

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_CONTEXT_SIZES = ("decode_context_parallel_size", "prefill_context_parallel_size", "cp_kv_cache_interleave_size")
# Safe to share between processes; others are seeded at random or are no cryptographic hashes.
_SAFE_HASHES = ("sha256", "sha256_cbor", "sha256_cbor_64bit")


def engine_id(config: VllmConfig) -> str:
    """Equal in the scheduler and in all workers of one engine, different for every data-parallel rank."""
    return str(config.kv_transfer_config.engine_id)


def embedded_node_name(config: VllmConfig) -> str:
    """The socket of the node inside this engine's scheduler process; found by its workers through the engine id."""
    return "engine-" + hashlib.sha256(engine_id(config).encode()).hexdigest()[:24]


def rank_count(config: VllmConfig) -> int:
    return int(config.parallel_config.world_size)


def worker_rank(config: VllmConfig) -> int:
    from vllm.distributed.parallel_state import get_world_group

    return int(get_world_group().rank_in_group) % rank_count(config)


def model_name(config: VllmConfig) -> str:
    return str(config.model_config.model)


def adapter_stamp(lora_request: Any) -> bytes:
    """Which weights a request's adapter has, beyond the name and path that vLLM hashes: they may be others after a
    restart. Empty without an adapter."""
    if lora_request is None:
        return b""
    return _stamp_at_load(str(lora_request.lora_name), int(lora_request.lora_int_id), str(lora_request.lora_path))


@functools.lru_cache(maxsize=4096)
def _stamp_at_load(name: str, number: int, path: str) -> bytes:
    """Of the files as they are when the adapter is first seen: what the engine has loaded stays when they change."""
    return hashlib.sha256(json.dumps([name, weight_files(path), hub_snapshot(path, None)]).encode()).digest()


def fingerprint(config: VllmConfig, namespace: str) -> bytes:
    """32 bytes that differ whenever equal tokens could have different KV. The layout of the bytes is not in it: the
    workers' memory tells that."""
    model = config.model_config
    cache = config.cache_config
    parallel = config.parallel_config
    algorithm = getattr(cache, "prefix_caching_hash_algo", "sha256")
    facts: dict[str, Any] = {
        "engine": ["vllm", vllm.__version__],
        "model": str(model.model),
        "revision": str(getattr(model, "revision", None)),
        "weights": weight_files(str(model.model)),
        "snapshot": hub_snapshot(str(model.model), getattr(model, "revision", None)),
        "hf_config": _hf_config(model),
        "dtype": str(model.dtype),
        "quantization": str(getattr(model, "quantization", None)),
        "load_format": str(getattr(config.load_config, "load_format", None)),
        "seed": getattr(model, "seed", None),
        "cache_dtype": str(cache.cache_dtype),
        "block_size": cache.block_size,
        "max_model_len_rope": str(getattr(model, "hf_overrides", None)),
        "parallel": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
        # Which tokens of a block lie on which rank: no layout tells that.
        "context": [getattr(parallel, name, None) for name in _CONTEXT_SIZES],
        "speculative": str(getattr(getattr(config, "speculative_config", None), "model", None)),
        "device": str(getattr(config.device_config, "device_type", None)),
        "attention": str(getattr(getattr(config, "attention_config", None), "backend", None)),
        "hash": str(algorithm),
        "namespace": namespace,
    }
    if algorithm not in _SAFE_HASHES:
        # Such hashes mean nothing in another process, and may collide in this one only by chance.
        facts["process"] = os.urandom(16).hex()
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).digest()


def _hf_config(model: Any) -> str:
    hf_config = getattr(model, "hf_config", None)
    return hf_config.to_json_string() if hasattr(hf_config, "to_json_string") else str(hf_config)
