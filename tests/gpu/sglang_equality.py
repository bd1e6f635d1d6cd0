"""Real SGLang on a GPU, through each of FlexKV's doors into it: outputs after a hit in FlexKV equal those after a hit in
the engine's own cache.

Both runs compute the same tail over KV that must be the same, so tokens are compared exactly, in bfloat16 too. The
weights are KV-sensitive. Then the longest prompt is timed to its first token. usage: sglang_equality.py DOOR [--graphs]
[--small]. Exit code 1 on a difference or a miss; `alone` (without FlexKV) computes anew after a flush, and may differ. `--small` is
for CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAGE = 64
HICACHE_FETCHES_FROM = 256  # tokens, SGLang's default
DOORS: dict[str, dict[str, Any]] = {
    "alone": {},
    "switch": {"enable_flexkv": True},
    "linker": {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": "FlexKVLinker",
            "linker_module_path": "flexkv.integration.sglang.linker",
        },
    },
    "hicache": {
        "enable_hierarchical_cache": True,
        "hicache_ratio": 2.0,
        "hicache_write_policy": "write_through",
        "hicache_storage_backend": "dynamic",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend_extra_config": json.dumps(
            {
                "backend_name": "flexkv",
                "module_path": "flexkv.integration.sglang.hicache",
                "class_name": "FlexKVHiCacheStorage",
                "interface_v1": 1,
            }
        ),
    },
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("door", choices=DOORS)
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    os.environ |= {"FLEXKV_RUNTIME_DIR": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1"}
    os.environ["FLEXKV_CPU_CACHE_GB"] = "256MB" if arguments.small else "6GB"
    from flexkv.demo.model import TINY_SHAPE, ModelShape, make_model

    shape = ModelShape(layers=32, hidden=1024, intermediate=2048, heads=8, kv_heads=8, head_size=128, max_tokens=8192)
    lengths, room = (63, 64, 65, 500, 2049, 5000, 7900), 40000
    where: dict[str, Any] = {"device": "cuda", "attention_backend": "triton", "dtype": "bfloat16"}
    if arguments.small:
        shape, lengths, room = TINY_SHAPE, (63, 64, 65, 500), 4096
        where = {"device": "cpu", "attention_backend": "torch_native", "dtype": "float32"}
    model = make_model(Path(tempfile.gettempdir()) / f"flexkv-sglang-{shape.layers}", shape)

    import sglang

    engine = sglang.Engine(
        model_path=str(model),
        sampling_backend="pytorch",
        disable_cuda_graph=not arguments.graphs,
        skip_server_warmup=True,
        page_size=PAGE,
        max_total_tokens=room,
        context_length=shape.max_tokens,
        mem_fraction_static=0.5,
        log_level="info",
        **where,
        **DOORS[arguments.door],
    )
    generator = random.Random(1)

    def ask(prompt: list[int], tokens: int) -> tuple[list[int], int, float]:
        begin = time.monotonic()
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        output = engine.generate(input_ids=prompt, sampling_params=sampling)
        return output["output_ids"], output["meta_info"]["cached_tokens"], time.monotonic() - begin

    def cold_own_last(prompt: list[int], tokens: int) -> list[tuple[list[int], int, float]]:
        runs = [ask(prompt, tokens), ask(prompt, tokens)]
        time.sleep(1)  # saves end
        if not engine.flush_cache().success:
            raise RuntimeError("flush_cache failed, so that the next hit would be the engine's own")
        return [*runs, ask(prompt, tokens)]

    def prompt_of(length: int) -> list[int]:
        return [generator.randrange(4, 512) for _ in range(length)]

    for _ in range(2):
        cold_own_last(prompt_of(lengths[-1]), 4)  # kernels are compiled
    different = missed = 0
    for length in lengths:
        cold, own, last = cold_own_last(prompt_of(length), 32)
        different += last[0] != own[0]
        asked = arguments.door != "hicache" or length >= HICACHE_FETCHES_FROM
        missed += asked and last[1] < (length - 1) // PAGE * PAGE
        print(
            f"RESULT {length} tokens: cached {cold[1]} {own[1]} {last[1]}, equal {last[0] == own[0]}, "
            f"equal to cold {last[0] == cold[0]}",
            flush=True,
        )
    turns = zip(*(cold_own_last(prompt_of(lengths[-1]), 1) for _ in range(5)), strict=True)
    seconds = [statistics.median(seconds for _, _, seconds in runs) for runs in turns]
    names = ("cold", "own hit", "after flush")
    times = ", ".join(f"{name} {value:.4f}" for name, value in zip(names, seconds, strict=True))
    print(f"RESULT {arguments.door}: {different} different, {missed} missed; {lengths[-1]} tokens in s: {times}", flush=True)
    engine.shutdown()
    return int(arguments.door != "alone" and bool(different or missed))


if __name__ == "__main__":
    sys.exit(main())
