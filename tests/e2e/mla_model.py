"""A small random model with multi-head latent attention (DeepSeek V2, dense), made without network. As in flexkv.demo.model
the weights are such that the output depends on all of the KV."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from flexkv.demo.model import TINY_SHAPE, VOCABULARY, make_model
from safetensors.torch import save_file

_LAYERS, _HIDDEN, _INTERMEDIATE, _HEADS = 2, 128, 256, 4
# What vLLM's kernels for CPUs take: latents of 512 + 64 elements.
_LATENT, _ROPE, _HEAD = 512, 64, 128
LATENT_BYTES_PER_TOKEN = _LAYERS * (_LATENT + _ROPE) * 4


def make_mla_model(directory: Path) -> Path:
    make_model(directory, TINY_SHAPE)  # its tokenizer
    config = json.loads((directory / "config.json").read_text())
    for name in ("num_key_value_heads", "head_dim"):
        del config[name]
    config |= {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "q_lora_rank": None,
        "kv_lora_rank": _LATENT,
        "qk_nope_head_dim": _HEAD,
        "qk_rope_head_dim": _ROPE,
        "v_head_dim": _HEAD,
        "first_k_dense_replace": _LAYERS,  # no layer has experts, but the rest of the configuration must be there
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 64,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    save_file(_weights(), str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (1.5 / math.sqrt(columns))

    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, _HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(_HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, _HIDDEN),
    }
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": torch.ones(_HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(_HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": matrix(_HEADS * (_HEAD + _ROPE), _HIDDEN),
            f"{prefix}.self_attn.kv_a_proj_with_mqa.weight": matrix(_LATENT + _ROPE, _HIDDEN),
            f"{prefix}.self_attn.kv_a_layernorm.weight": torch.ones(_LATENT),
            f"{prefix}.self_attn.kv_b_proj.weight": matrix(2 * _HEADS * _HEAD, _LATENT),
            f"{prefix}.self_attn.o_proj.weight": matrix(_HIDDEN, _HEADS * _HEAD),
            f"{prefix}.mlp.gate_proj.weight": matrix(_INTERMEDIATE, _HIDDEN),
            f"{prefix}.mlp.up_proj.weight": matrix(_INTERMEDIATE, _HIDDEN),
            f"{prefix}.mlp.down_proj.weight": matrix(_HIDDEN, _INTERMEDIATE),
        }
    return tensors
