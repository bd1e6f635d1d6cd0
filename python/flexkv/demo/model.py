"""A small random llama on disk, made without network: what the demo and the end-to-end tests serve.

The weights are KV-sensitive: attention scores spread enough for every output token to depend on what was said long
before it, so KV that is wrong, stale or in the wrong place changes the text. (vLLM's own `load_format="dummy"` draws
weights so small that the output hardly depends on the prompt at all; a cache serving zeros would pass unseen.)
float32 throughout: in bfloat16 a different batch composition alone flips near-ties between tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

VOCABULARY = 512
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
_EMBEDDING_STD = 1.0
# 1.0 would keep activations at their size from layer to layer; a little more spreads the attention scores.
_WEIGHT_GAIN = 1.5
_COMPLETE = "complete.json"

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Shape of a llama. `heads`, `kv_heads` and `head_size` count per model, not per rank."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    max_tokens: int
    # Set: every third layer sees all tokens, the others only so many back.
    window: int | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * 4


# About 50 million parameters: on one CPU core some 2 ms of prefill for each token, against 16 KiB of KV to copy.
DEMO_SHAPE = ModelShape(layers=8, hidden=768, intermediate=2048, heads=12, kv_heads=4, head_size=64, max_tokens=32768)
# Starts fast, and two KV heads so that two tensor-parallel ranks hold different halves.
TINY_SHAPE = ModelShape(layers=2, hidden=128, intermediate=256, heads=4, kv_heads=2, head_size=32, max_tokens=2048)
# Two layers with full attention and four with a window, which vLLM keeps in three KV cache groups.
TINY_HYBRID_SHAPE = dataclasses.replace(TINY_SHAPE, layers=6, window=80)


def make_model(directory: Path, shape: ModelShape, seed: int = 0) -> Path:
    """Writes the model into `directory` unless the same one is complete there already; returns `directory`."""
    stamp = {"shape": dataclasses.asdict(shape), "seed": seed, "gain": _WEIGHT_GAIN, "format": 1}
    complete = directory / _COMPLETE
    if complete.is_file() and json.loads(complete.read_text()) == stamp:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    complete.unlink(missing_ok=True)
    _write_config(directory, shape)
    _write_tokenizer(directory, shape)
    _write_weights(directory, shape, seed)
    complete.write_text(json.dumps(stamp))
    return directory


def make_lora(directory: Path, shape: ModelShape, seed: int, rank: int = 8) -> Path:
    """Writes a random LoRA adapter on the query and value projections, strong enough to change the output."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(shape.layers):
        for name, heads in (("q_proj", shape.heads), ("v_proj", shape.kv_heads)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(rank, shape.hidden, generator=generator) / math.sqrt(shape.hidden)
            up = torch.randn(heads * shape.head_size, rank, generator=generator)
            tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "base_model_name_or_path": "",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return directory


def _write_config(directory: Path, shape: ModelShape) -> None:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = special | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.max_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "float32",
    }
    if shape.window is not None:
        kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(shape.layers)]
        config |= {"sliding_window": shape.window, "layer_types": kinds}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "generation_config.json").write_text(json.dumps(special))


def _write_tokenizer(directory: Path, shape: ModelShape) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<x{i}>" for i in range(VOCABULARY - len(names))]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": shape.max_tokens,
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def _write_weights(directory: Path, shape: ModelShape, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (_WEIGHT_GAIN / math.sqrt(columns))

    q_size, kv_size = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, shape.hidden, generator=generator) * _EMBEDDING_STD,
        "model.norm.weight": torch.ones(shape.hidden),
        "lm_head.weight": matrix(VOCABULARY, shape.hidden),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": torch.ones(shape.hidden),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(shape.hidden),
            f"{prefix}.self_attn.q_proj.weight": matrix(q_size, shape.hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(kv_size, shape.hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(kv_size, shape.hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(shape.hidden, q_size),
            f"{prefix}.mlp.gate_proj.weight": matrix(shape.intermediate, shape.hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(shape.intermediate, shape.hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(shape.hidden, shape.intermediate),
        }
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
