"""A small random model some of whose layers keep a state instead of KV (LFM2: short convolutions between attention), made
without network. As in flexkv.demo.model the weights are such that the output depends on all of the prompt."""

from __future__ import annotations

import json
import math
from pathlib import Path

from flexkv.demo.model import TINY_SHAPE, VOCABULARY, make_model


def make_state_model(directory: Path) -> Path:
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    make_model(directory, TINY_SHAPE)  # its tokenizer
    config = Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=TINY_SHAPE.hidden,
        intermediate_size=TINY_SHAPE.intermediate,
        num_hidden_layers=4,
        num_attention_heads=TINY_SHAPE.heads,
        num_key_value_heads=TINY_SHAPE.kv_heads,
        max_position_embeddings=TINY_SHAPE.max_tokens,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        dtype="float32",
    )
    model = Lfm2ForCausalLM(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1:
                spread = 1.0 if "embed" in name else 1.5 / math.sqrt(weights[0].numel())
                weights.copy_(torch.randn(weights.shape, generator=generator) * spread)
    model.save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    # What vLLM's code for this model reads and transformers does not write any more.
    widths = {"conv_dim": TINY_SHAPE.hidden, "block_dim": TINY_SHAPE.hidden}
    (directory / "config.json").write_text(json.dumps(written | widths))
    return directory
