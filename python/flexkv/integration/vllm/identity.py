"""Who this engine is, and on what its KV bytes depend besides the tokens: read from vLLM's configuration."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import vllm

from flexkv.integration.vllm.machines import machines_of
from flexkv.integration.weights import hub_snapshot, weight_files

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_CONTEXT_SIZES = ("decode_context_parallel_size", "prefill_context_parallel_size", "cp_kv_cache_interleave_size")
# What becomes of an image, besides its own hash: vLLM hashes what a request says of this, not what the engine was told.
_MULTIMODAL = (
    "media_io_kwargs",
    "mm_device_do_normalize",
    "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path",
    "mm_processor_kwargs",
    "video_pruning_method",
    "video_pruning_rate",
)
# Safe to share between processes; others are seeded at random or are no cryptographic hashes.
_SAFE_HASHES = ("sha256", "sha256_cbor", "sha256_cbor_64bit")


def engine_id(config: VllmConfig) -> str:
    """Equal in the scheduler and in all workers of one engine, different for every data-parallel rank."""
    if machines_of(config).count == 1:
        return str(config.kv_transfer_config.engine_id)
    # That of vLLM is another one on each machine, unless the user gave it.
    parallel = config.parallel_config
    meets_at = f"{parallel.master_addr}:{parallel.master_port}, data-parallel rank {parallel.data_parallel_rank}"
    return hashlib.sha256(meets_at.encode()).hexdigest()[:32]


def embedded_node_name(config: VllmConfig) -> str:
    """The socket of the node inside this engine's scheduler process; found by its workers through the engine id."""
    return "engine-" + hashlib.sha256(engine_id(config).encode()).hexdigest()[:24]


def rank_count(config: VllmConfig) -> int:
    """Of this engine, on all machines."""
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


def only_here(config: VllmConfig) -> str | None:
    """Why keys of this process mean nothing in another one; None if they do."""
    cache = config.cache_config
    algorithm = getattr(cache, "prefix_caching_hash_algo", "sha256")
    if algorithm not in _SAFE_HASHES:
        # They may collide in this process, too, but only by chance.
        return f"block hashes are made by {algorithm}, which is seeded at random or not cryptographic"
    images = getattr(config.model_config, "multimodal_config", None)
    if images is not None and not cache.enable_prefix_caching and getattr(images, "mm_processor_cache_gb", 0) == 0:
        return "images have no hashes, as prefix caching and the cache of processed images are both switched off"
    if getattr(cache, "calculate_kv_scales", False):  # before 0.32
        return "the scales of the KV cache are computed anew in each process"
    return None


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
        "cache_dtype_skips": str(getattr(cache, "kv_cache_dtype_skip_layers", None)),
        "multimodal": _values(getattr(model, "multimodal_config", None), _MULTIMODAL),
        "block_size": cache.block_size,
        "max_model_len_rope": str(getattr(model, "hf_overrides", None)),
        "parallel": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
        # Which tokens of a block lie on which rank: no layout tells that.
        "context": _values(parallel, _CONTEXT_SIZES),
        "speculative": _draft(config),
        "device": str(getattr(config.device_config, "device_type", None)),
        "attention": str(getattr(getattr(config, "attention_config", None), "backend", None)),
        "hash": str(algorithm),
        "namespace": namespace,
    }
    if only_here(config) is not None:
        facts["process"] = os.urandom(16).hex()
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).digest()


def _hf_config(model: Any) -> str:
    hf_config = getattr(model, "hf_config", None)
    return hf_config.to_json_string() if hasattr(hf_config, "to_json_string") else str(hf_config)


def _draft(config: VllmConfig) -> list[Any]:
    """The draft model, whose layers have their KV in the same blocks."""
    speculative = getattr(config, "speculative_config", None)
    model, revision = getattr(speculative, "model", None), getattr(speculative, "revision", None)
    if model is None:
        return []
    return [str(model), str(revision), weight_files(str(model)), hub_snapshot(str(model), revision)]


def _values(config: Any, names: tuple[str, ...]) -> list[Any]:
    return [getattr(config, name, None) for name in names]
