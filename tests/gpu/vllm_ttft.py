"""Time to first token on a GPU: long prompts computed, then served from FlexKV after the engine's own cache was reset.

usage: vllm_ttft.py [--without] [--layers N] [--cpu-cache SIZE] [--connector stock|full] [--tokens N] [--graphs]
                    [--ssd DIR [--load-policy auto|always]]
With --ssd: prompts that host memory cannot hold, from drives, beside what the drive can do.
Makes an 8B-shaped model with dummy weights. Prints one RESULT line per case; exit code 1 if outputs differ.
Dummy weights depend little on the KV, so equal outputs prove little: tests/gpu/vllm_equality.py looks at that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODEL = Path("/tmp/flexkv-gpu-model")
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


def prompt(seed: int, length: int) -> list[int]:
    return [(i * i * 7 + i * 13 * seed + seed * 101) % 31000 + 5 for i in range(length)]


def engine_options(arguments: argparse.Namespace, memory: float) -> dict[str, Any]:
    """`memory`: share of the GPU's."""
    return {
        "model": str(MODEL),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": arguments.tokens + 2000,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": memory,
        "enforce_eager": not arguments.graphs,
        "seed": 0,
    }


def from_drives(llm: Any, run: Any, arguments: argparse.Namespace) -> bool:
    prompts = [prompt(300 + i, arguments.tokens) for i in range(6)]
    cold = [run([one], 1) for one in prompts]
    time.sleep(15)  # written behind
    equal = True
    for turn in range(2):
        llm.reset_prefix_cache()
        for number, one in enumerate(prompts):
            seconds, tokens, cached = run([one], 1)
            equal &= tokens == cold[number][1]
            print(
                f"RESULT from drives, turn {turn}: cold {cold[number][0]:.3f} s, again {seconds:.3f} s "
                f"({cached[0]} tokens cached), equal {equal}",
                flush=True,
            )
    subprocess.run([sys.executable, "-m", "flexkv.cli", "status"], check=False)
    return equal


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--without", action="store_true")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--cpu-cache", default="48GB")
    parser.add_argument("--connector", choices=("stock", "full"), default="stock")
    parser.add_argument("--tokens", type=int, default=21000)
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs and torch.compile on")
    parser.add_argument("--ssd", default="")
    parser.add_argument("--load-policy", default="auto")
    arguments = parser.parse_args()
    MODEL.mkdir(exist_ok=True)
    (MODEL / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": arguments.layers}))
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    options = engine_options(arguments, 0.55)
    if not arguments.without:
        transfer = {
            "kv_connector": "FlexKVConnectorV1",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"cpu_cache_gb": arguments.cpu_cache},
        }
        if arguments.ssd:
            transfer["kv_connector_extra_config"] |= {
                "ssd_cache_gb": 40,
                "ssd_cache_dir": arguments.ssd,
                "ssd_admission": False,
                "ssd_load_policy": arguments.load_policy,
            }
        if arguments.connector == "full":
            transfer |= {
                "kv_connector": "FlexKVConnector",
                "kv_connector_module_path": "flexkv.integration.vllm.connector",
            }
        options["kv_transfer_config"] = transfer
    begin = time.monotonic()
    llm = LLM(**options)
    print(f"engine started in {time.monotonic() - begin:.1f} s", flush=True)

    def run(prompts: list[list[int]], max_tokens: int) -> tuple[float, list[list[int]], list[int | None]]:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        start = time.monotonic()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return time.monotonic() - start, tokens, [output.num_cached_tokens for output in outputs]

    run([prompt(999, 2000)], 4)
    time.sleep(8)  # the pool is touched and pinned in the background
    if arguments.ssd:
        return 0 if from_drives(llm, run, arguments) else 1
    equal = True
    cases = {"one": [prompt(1, arguments.tokens)], "eight": [prompt(10 + i, arguments.tokens) for i in range(8)]}
    for name, prompts in cases.items():
        cold, cold_tokens, _ = run(prompts, 1)
        time.sleep(1.5)
        again = []
        for _ in range(3):
            llm.reset_prefix_cache()
            seconds, tokens, cached = run(prompts, 1)
            again.append(seconds)
            equal &= tokens == cold_tokens
            time.sleep(0.3)
        own, _, _ = run(prompts, 1)
        print(
            f"RESULT {name}: cold {cold:.3f} s, after reset {' '.join(f'{s:.3f}' for s in again)} s "
            f"({cached[0]} tokens cached), engine's own hit {own:.3f} s, equal {equal}",
            flush=True,
        )
    seconds, _, _ = run([prompt(200 + i, 6000) for i in range(24)], 32)
    print(f"RESULT no reuse, 24 prompts of 6000, 32 tokens each: {seconds:.3f} s", flush=True)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
