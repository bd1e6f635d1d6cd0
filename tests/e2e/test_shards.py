"""Which ranks of an engine are said to hold the same bytes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from flexkv.integration.vllm.shards import first_alike, shard_of
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec, MLAAttentionSpec, SlidingWindowSpec

HEAD = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32)
WINDOW = SlidingWindowSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32, sliding_window=64)
LATENT = MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=576, dtype=torch.bfloat16, max_tp_shards=1)
STATE = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))


class Layer:
    def __init__(self, spec: KVCacheSpec) -> None:
        self._spec = spec

    def get_kv_cache_spec(self, config: Any) -> KVCacheSpec:
        return self._spec


def shards(
    *specs: KVCacheSpec,
    tp: int = 1,
    pp: int = 1,
    dcp: int = 1,
    pcp: int = 1,
    heads: int = 1,
    architecture: str = "LlamaForCausalLM",
    quantization: str | None = None,
    draft: Any = None,
    device: str = "cuda",
    machines: int = 1,
) -> list[int]:
    """Of all ranks."""
    layers = {f"layer.{i}": Layer(spec) for i, spec in enumerate(specs)}
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            decode_context_parallel_size=dcp,
            prefill_context_parallel_size=pcp,
        ),
        model_config=SimpleNamespace(
            architecture=architecture, quantization=quantization, get_total_num_kv_heads=lambda: heads
        ),
        speculative_config=draft,
        device_config=SimpleNamespace(device_type=device),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )
    ranks = tp * pp * pcp
    on_each = ranks // machines
    return [first_alike(config, rank // on_each * on_each, rank, layers) for rank in range(ranks)]


def test_latents_are_the_same_on_all_tensor_parallel_ranks() -> None:
    assert shards(LATENT) == [0]
    assert shards(LATENT, LATENT, tp=4) == [0, 0, 0, 0]
    assert shards(LATENT, tp=3, quantization="fp8", draft=object()) == [0, 0, 0]


def test_each_machine_stores_what_its_ranks_hold() -> None:
    assert shards(LATENT, tp=4, machines=2) == [0, 0, 2, 2]
    assert shards(LATENT, tp=2, pp=2, machines=2) == [0, 0, 2, 2]
    assert shards(LATENT, tp=4, dcp=2, machines=2) == [0, 1, 2, 3]
    assert shards(HEAD, tp=8, heads=2, machines=2) == [0, 0, 0, 0, 4, 4, 4, 4]
    assert shards(HEAD, tp=8, heads=1, machines=2) == [0, 0, 0, 0, 4, 4, 4, 4]


def test_what_only_looks_like_latents_is_not_alike() -> None:
    assert shards(LATENT, dataclasses.replace(LATENT, max_tp_shards=None), tp=2) == [0, 1]


def test_heads_are_repeated_on_neighbours() -> None:
    assert shards(HEAD, HEAD, tp=4, heads=2) == [0, 0, 2, 2]
    assert shards(HEAD, WINDOW, tp=8, heads=1) == [0] * 8
    assert shards(HEAD, tp=4, heads=4) == [0, 1, 2, 3]
    assert shards(dataclasses.replace(HEAD, num_kv_heads=2), tp=4, heads=8) == [0, 1, 2, 3]


def test_pipeline_stages_hold_different_layers() -> None:
    assert shards(LATENT, tp=2, pp=3) == [0, 0, 2, 2, 4, 4]
    assert shards(LATENT, tp=1, pp=2) == [0, 1]
    assert shards(HEAD, tp=4, pp=2, heads=2) == [0, 0, 2, 2, 4, 4, 6, 6]


def test_context_parallel_ranks_hold_different_tokens() -> None:
    assert shards(LATENT, tp=4, dcp=2) == [0, 1, 0, 1]
    assert shards(LATENT, tp=4, dcp=4, pp=2) == list(range(8))
    assert shards(HEAD, tp=8, dcp=2, heads=2) == [0, 1, 0, 1, 4, 5, 4, 5]
    assert shards(HEAD, tp=8, dcp=4, heads=4) == list(range(8))  # not a division that vLLM makes
    assert shards(LATENT, tp=2, pcp=2) == [0, 1, 2, 3]


def test_sums_over_more_than_two_ranks_are_not_alike_on_cpus() -> None:
    assert shards(LATENT, tp=2, pp=2, device="cpu") == [0, 0, 2, 2]
    assert shards(LATENT, tp=4, device="cpu") == [0, 1, 2, 3]
    assert shards(HEAD, tp=4, heads=2, device="cpu") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "unlike",
    [
        {"architecture": "DeciLMForCausalLM"},  # layers with different numbers of heads
        {"architecture": "TransformersForCausalLM"},
        {"quantization": "fp8"},
        {"draft": object()},
    ],
)
def test_what_is_not_certain_is_not_alike(unlike: dict[str, Any]) -> None:
    assert shards(HEAD, tp=2, heads=1, **unlike) == [0, 1]


def test_the_least_that_all_layers_have_in_common_counts() -> None:
    assert shards(LATENT, HEAD, tp=4, heads=2, architecture="LlamaForCausalLM") == [0, 0, 2, 2]
    assert shards(LATENT, HEAD, tp=4, heads=2, architecture="NewForCausalLM") == [0, 1, 2, 3]
    assert shards(LATENT, STATE, tp=2) == [0, 1]


def test_a_layer_that_the_engine_does_not_know_is_not_alike() -> None:
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
        device_config=SimpleNamespace(device_type="cuda"),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    assert [shard_of(config, rank, ["layer.0"]) for rank in range(2)] == [0, 1]
