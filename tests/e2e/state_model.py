"""Small random models some of whose layers keep a state instead of KV, made without network. As in flexkv.demo.model the
weights are such that the output depends on all of the prompt."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from flexkv.demo.model import TINY_SHAPE, VOCABULARY, make_model


def make_convolution_model(directory: Path) -> Path:
    """LFM2: short convolutions between attention."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        **_sizes(),
        num_hidden_layers=4,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )
    # What vLLM's code for this model reads and transformers does not write any more.
    return _write(directory, Lfm2ForCausalLM(config), {"conv_dim": TINY_SHAPE.hidden, "block_dim": TINY_SHAPE.hidden})


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": TINY_SHAPE.hidden,
        "intermediate_size": TINY_SHAPE.intermediate,
        "num_attention_heads": TINY_SHAPE.heads,
        "num_key_value_heads": TINY_SHAPE.kv_heads,
        "max_position_embeddings": TINY_SHAPE.max_tokens,
        "dtype": "float32",
    }


def _write(directory: Path, model: Any, more: dict[str, Any]) -> Path:
    """`more`: of its configuration."""
    import torch

    make_model(directory, TINY_SHAPE)  # its tokenizer
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1:
                spread = 1.0 if "embed" in name else 1.5 / math.sqrt(weights[0].numel())
                weights.copy_(torch.randn(weights.shape, generator=generator) * spread)
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | more))
    return directory
