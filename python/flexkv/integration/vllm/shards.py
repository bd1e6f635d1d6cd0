"""Which ranks hold the same KV: it is stored once, saved by all of them in slices, and loaded by all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# All layers of these have `num_key_value_heads` heads, and with fewer heads than ranks tp / heads neighbours compute
# the same one (QKVParallelLinear). A layer does not tell how many heads it has on all ranks together, and in other
# models not all layers have as many.
_ALL_LAYERS_ALIKE = frozenset(
    {
        "Glm4MoeForCausalLM",
        "LlamaForCausalLM",
        "MixtralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)


def shard_of(config: VllmConfig, rank: int, layer_names: Iterable[str]) -> int:
    """The first rank whose blocks of these layers hold the same bytes as those of `rank`; `rank` itself unless that is
    certain.

    vLLM numbers ranks by pipeline stage, then by prefill context, then tensor parallel ones. Stages have different
    layers and are never alike. Ranks of decode context parallelism are tensor parallel neighbours with different tokens.
    """
    parallel = config.parallel_config
    ranks = parallel.tensor_parallel_size
    if ranks == 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return rank
    # CPUs add up the ranks' parts of a layer beginning with their own: sums of three and more differ in the last bits,
    # and so does the KV of the next layer. GPUs add in one order, or in one place.
    if str(config.device_config.device_type) == "cpu" and ranks > 2:
        return rank
    alike = math.gcd(ranks, *(_alike(config, _spec(config, layer_name)) for layer_name in layer_names))
    with_other_tokens = getattr(parallel, "decode_context_parallel_size", 1)
    if alike % with_other_tokens != 0:
        return rank
    return rank - rank % alike + rank % with_other_tokens


def first_alike(config: VllmConfig, first_rank: int, rank: int, layer_names: Iterable[str]) -> int:
    """The same among the ranks from `first_rank` on, those of this machine: each machine stores what its ranks hold."""
    names = list(layer_names)
    shard = shard_of(config, rank, names)
    return next(one for one in range(first_rank, rank + 1) if shard_of(config, one, names) == shard)


def _spec(config: VllmConfig, layer_name: str) -> Any:
    """What vLLM says of the layer's cache; None: nothing."""
    try:
        return config.compilation_config.static_forward_context[layer_name].get_kv_cache_spec(config)
    except Exception:  # a layer of another kind
        return None


def _alike(config: VllmConfig, spec: Any) -> int:
    """How many tensor parallel neighbours hold the same heads of a layer; 1 unless that is certain."""
    ranks = config.parallel_config.tensor_parallel_size
    # vLLM says it (since 0.32) of MLA's latents and what goes with them: each rank has all, as there are no heads to
    # divide. Not all that looks like a latent is one: some models divide the index of their sparse attention.
    parts = getattr(spec, "max_tp_shards", None)
    if parts is None and type(spec) in (FullAttentionSpec, SlidingWindowSpec) and _heads_are_alike(config):
        parts = config.model_config.get_total_num_kv_heads()
    return ranks // parts if parts is not None and ranks % parts == 0 else 1


def _heads_are_alike(config: VllmConfig) -> bool:
    # Weights that are quantized as they are loaded are scaled by what a rank has of the layer, its own query heads
    # included; a draft model has heads of its own.
    return (
        config.model_config.architecture in _ALL_LAYERS_ALIKE
        and config.model_config.quantization is None
        and config.speculative_config is None
    )
