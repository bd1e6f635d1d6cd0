"""SGLang's configuration as a manager understands it, and what its --enable-flexkv cannot do."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
from typing import TYPE_CHECKING, Any

from flexkv.integration.weights import hub_snapshot, weight_files
from flexkv.manager import ModelConfig, RankInfo
from flexkv.manager.place import gpu_register_port, ranked_port

if TYPE_CHECKING:
    from flexkv.integration.config import FlexKVConfig

logger = logging.getLogger("flexkv.sglang")

_SMALL_PAGE = 16  # tokens


def complete(
    config: FlexKVConfig,
    sglang_config: Any,
    server_args: Any,
    page_size: int,
    tp_rank: int,
    pp_rank: int,
    dp_rank: int,
    attn_cp_rank: int,
) -> RankInfo:
    """Fills in the configuration for this rank."""
    _refuse(config, server_args)
    attn_dp_size = getattr(server_args, "attn_dp_size", 1) or 1
    model = ModelConfig(
        num_layers=sglang_config.num_hidden_layers,
        num_kv_heads=sglang_config.get_total_num_kv_heads(),
        head_size=sglang_config.head_dim,
        dtype=sglang_config.dtype,
        tp_size=server_args.tp_size // attn_dp_size,
        pp_size=server_args.pp_size,
        dp_size=server_args.dp_size * attn_dp_size,
        cp_size=1,
        attn_cp_size=getattr(server_args, "attn_cp_size", 1) or 1,
        use_mla=getattr(sglang_config.attention_arch, "name", "") == "MLA",
        identity=identity(sglang_config, server_args),
    )
    if page_size < _SMALL_PAGE:
        logger.warning(
            "SGLang's page size is %d: FlexKV keeps that few tokens as a block, which costs much bookkeeping. Start SGLang with "
            "--page-size %d or more",
            *(page_size, _SMALL_PAGE),
        )
    start, end = _layers_of(pp_rank, model)
    config.model_config = model
    config.cache_config.tokens_per_block = page_size
    # Other ranks do not learn that a load has failed, and would go on with what it left: no promise may depend on a drive.
    config.cache_config.host_memory_only = True
    rank = RankInfo(
        model_config=model,
        tp_rank=tp_rank % model.tp_size,
        pp_rank=pp_rank,
        dp_rank=_data_parallel_rank(dp_rank, tp_rank // model.tp_size, attn_dp_size),
        attn_cp_rank=attn_cp_rank,
        pp_start_layer=start,
        pp_end_layer=end,
        local_rank=pp_rank * server_args.tp_size + tp_rank,
    )
    config.server_recv_port = engine_port(server_args)
    # SGLang does not tell the client its rank.
    config.gpu_register_port = ranked_port(
        gpu_register_port(config.server_recv_port), rank.intra_client_id, model.rank_count
    )
    return rank


def _refuse(config: FlexKVConfig, server_args: Any) -> None:
    if not config.enable_flexkv:
        raise ValueError("ENABLE_FLEXKV=0: start SGLang without --enable-flexkv instead")
    if os.environ.get("FLEXKV_ENABLE_LAYERWISE_TRANSFER", "0") not in ("", "0"):
        raise ValueError(
            "FLEXKV_ENABLE_LAYERWISE_TRANSFER=1 is not supported: SGLang then gives slots that a load still fills to other "
            "requests. Unset it, or use the linker, whose loads are layer-wise (docs/engines/sglang.md)"
        )
    if getattr(server_args, "nnodes", 1) > 1:
        raise ValueError("--enable-flexkv: an engine on several machines (--nnodes) is not supported")
    if getattr(server_args, "enable_lora", False) or getattr(server_args, "lora_paths", None):
        raise ValueError(
            "--enable-flexkv cannot be used with LoRA: SGLang does not tell FlexKV which adapter a prompt is for, so "
            "KV of one adapter would be served to another. Start it without --enable-lora, or without --enable-flexkv"
        )
    logger.warning(
        "SGLang's --enable-flexkv does not tell FlexKV the cache_salt or extra_key of a request: requests with different "
        "ones share KV. Do not use it where they must not"
    )


def _data_parallel_rank(dp_rank: int, attn_dp_rank: int, attn_dp_size: int) -> int:
    """SGLang 0.5.23 gives its cache no data-parallel rank (0 for all): taken from where the process is placed."""
    try:
        from sglang.srt.runtime_context import get_parallel

        dp_rank = get_parallel().dp_rank or 0
    except (ImportError, AttributeError, RuntimeError):
        pass
    return dp_rank * attn_dp_size + attn_dp_rank


def _layers_of(pp_rank: int, model: ModelConfig) -> tuple[int, int]:
    if model.pp_size == 1:
        return 0, model.num_layers
    from sglang.srt.distributed.utils import get_pp_indices

    start, end = get_pp_indices(model.num_layers, pp_rank, model.pp_size)
    return start, end


def engine_port(server_args: Any) -> str:
    """Equal for the processes of one engine, whose launcher is their parent; different for any two engines that run. In
    containers all launchers may be process 1 with the same port: a daemon would take ranks of one for another's."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"ipc:///sglang-{namespace}-{os.getppid()}-{getattr(server_args, 'port', 0)}"


def identity(sglang_config: Any, server_args: Any) -> str:
    """Differs whenever equal tokens could have different KV."""
    path = str(server_args.model_path)
    revision = getattr(server_args, "revision", None)
    names = (
        *("load_format", "quantization", "kv_cache_dtype", "dtype", "attention_backend", "device"),
        *("json_model_override_args", "speculative_algorithm", "speculative_draft_model_path", "hf_overrides"),
    )
    facts = {
        "engine": ["sglang", _version()],
        "model": path,
        "revision": revision,
        "weights": weight_files(path),
        "snapshot": hub_snapshot(path, revision),
        "hf_config": sglang_config.hf_config.to_json_string(),
        "seed": server_args.random_seed if server_args.load_format == "dummy" else None,
        "arguments": {name: str(getattr(server_args, name, None)) for name in names},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
