"""Real vLLM on a GPU: outputs after a hit in FlexKV equal those after a hit in the engine's own cache.

Both runs compute the same tail over KV that must be the same, so tokens are compared exactly, in bfloat16 too. The
weights are KV-sensitive. `--sleep`: the engine also gives its KV memory away, takes it back and computes once more.
usage: vllm_equality.py [--connector stock|full] [--load sync|async] [--sleep]. Exit code 1 on a difference.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--connector", choices=("stock", "full"), default="stock")
    parser.add_argument("--load", choices=("sync", "async"), default="sync")
    parser.add_argument("--sleep", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from flexkv.demo.model import ModelShape, make_model

    # Blocks of 2 MiB: loads within a step come in several parts.
    shape = ModelShape(layers=32, hidden=1024, intermediate=2048, heads=8, kv_heads=8, head_size=128, max_tokens=8192)
    model = make_model(Path("/tmp/flexkv-equality-model"), shape)
    from vllm import LLM, SamplingParams

    transfer = {
        "kv_connector": "FlexKVConnectorV1",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "cpu_cache_gb": "6GB",
            "sync_load_max_mb": 4096 if arguments.load == "sync" else 0,
        },
    }
    if arguments.connector == "full":
        transfer |= {
            "kv_connector": "FlexKVConnector",
            "kv_connector_module_path": "flexkv.integration.vllm.connector",
        }
    llm = LLM(
        model=str(model),
        dtype="bfloat16",
        max_model_len=8000,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.2,
        enforce_eager=True,
        enable_sleep_mode=arguments.sleep,
        kv_transfer_config=transfer,
    )
    sampling = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)
    generator = random.Random(1)
    prompts = [[generator.randrange(4, 512) for _ in range(length)] for length in (15, 16, 17, 500, 2049, 5000, 7900)]
    different = missed = 0
    for ids in prompts:
        runs = []
        for kind in ("cold", "own", *(["slept"] if arguments.sleep else []), "flexkv"):
            if kind == "slept":
                llm.sleep(level=1)
                llm.wake_up()
            if kind == "flexkv":
                time.sleep(0.3)
                llm.reset_prefix_cache()
            output = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]
            runs.append((list(output.outputs[0].token_ids), output.num_cached_tokens))
        cold, own, last = runs[0], runs[1], runs[-1]
        equal = own[0] == last[0]
        hit = (last[1] or 0) >= (len(ids) - 1) // 16 * 16
        if arguments.sleep:
            equal = equal and runs[2][0] == cold[0]
            hit = hit and not runs[2][1]  # vLLM resets its connector before it sleeps
        different += not equal
        missed += not hit
        print(f"RESULT {len(ids)} tokens: cached {last[1]}, equal {equal}, equal to cold {cold[0] == last[0]}")
    print(f"RESULT {different} different, {missed} missed")
    return 1 if different or missed else 0


if __name__ == "__main__":
    sys.exit(main())
