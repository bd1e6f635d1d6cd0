"""A small random model that sees images (BLIP-2 before an OPT, whose code in vLLM does without torchvision), made without
network. As in flexkv.demo.model the weights are such that the output depends on all of the KV."""

from __future__ import annotations

import json
import math
from pathlib import Path

from flexkv.demo.model import TINY_SHAPE, VOCABULARY, make_model

IMAGE_TOKENS = 40  # placeholders that the engine puts before a prompt with an image
_SIDE, _PATCH = 56, 14
_WIDTH = 64


def make_vision_model(directory: Path) -> Path:
    import torch
    from tokenizers import Tokenizer
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    make_model(directory, TINY_SHAPE)  # its tokenizer
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=_SIDE,
            patch_size=_PATCH,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            encoder_hidden_size=_WIDTH,
        ).to_dict(),
        text_config=OPTConfig(
            vocab_size=VOCABULARY + 64,  # the image's token is behind the others
            hidden_size=TINY_SHAPE.hidden,
            ffn_dim=TINY_SHAPE.intermediate,
            num_hidden_layers=TINY_SHAPE.layers,
            num_attention_heads=TINY_SHAPE.heads,
            word_embed_proj_dim=TINY_SHAPE.hidden,
            max_position_embeddings=TINY_SHAPE.max_tokens,
            tie_word_embeddings=False,  # else the last token would be said again and again
        ).to_dict(),
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=VOCABULARY,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = Blip2ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1:
                spread = 1.0 if "embed" in name or "query_tokens" in name else 1.5 / math.sqrt(weights[0].numel())
                weights.copy_(torch.randn(weights.shape, generator=generator) * spread)
    model.save_pretrained(directory)

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    size = {"height": _SIDE, "width": _SIDE}
    images = {"image_processor_type": "BlipImageProcessor", "size": size, "processor_class": "Blip2Processor"}
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": IMAGE_TOKENS}
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    (directory / "processor_config.json").write_text(json.dumps(processor))
    return directory
