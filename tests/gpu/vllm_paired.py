"""Engines on one GPU that take turns: alone, with FlexKV, with vLLM's own offloading. Only so are a few percent told from
the clock of the GPU, which wanders by as much between two runs.

usage: vllm_paired.py [--engines alone,stock,full,own] [--turns N] [--tokens N] [--graphs] [--cases NAME,...]
Prints one RESULT line for each case and engine: the median seconds, and of each turn's ratio to the engine alone the
median, the least and the most. Exit code 1 if outputs of one prompt differ between engines.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from vllm_ttft import MODEL, SHAPE, engine_options, prompt

# What vLLM is told for each kind of engine.
TRANSFERS: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "stock": {"kv_connector": "FlexKVConnectorV1", "kv_connector_extra_config": {"cpu_cache_gb": "36GB"}},
    "full": {
        "kv_connector": "FlexKVConnector",
        "kv_connector_module_path": "flexkv.integration.vllm.connector",
        "kv_connector_extra_config": {"cpu_cache_gb": "36GB"},
    },
    "own": {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"cpu_bytes_to_use": 36 << 30}},
}
# name: prompts of a turn (given the number of the turn), tokens to be generated, what is done before
CASES = ("cold", "own hit", "after reset", "eight after reset", "no reuse", "decode")


def serve(kind: str, arguments: argparse.Namespace) -> None:
    """The child: an engine that reads one order a line and answers with one line."""
    from vllm import LLM, SamplingParams

    options = engine_options(arguments, arguments.memory)
    if transfer := TRANSFERS[kind]:
        policy = {} if kind == "own" else {"kv_load_failure_policy": "recompute"}
        options["kv_transfer_config"] = {"kv_role": "kv_both"} | policy | transfer
    llm = LLM(**options)

    def run(prompts: list[list[int]], count: int) -> tuple[float, list[list[int]]]:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        begin = time.monotonic()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return time.monotonic() - begin, [list(output.outputs[0].token_ids) for output in outputs]

    tokens = arguments.tokens
    run([prompt(999, 2000)], 4)
    time.sleep(8)  # host memory is touched and pinned in the background
    print("READY", flush=True)
    for line in sys.stdin:
        case, turn = json.loads(line)
        one, eight = [prompt(1, tokens)], [prompt(10 + i, tokens) for i in range(8)]
        if case == "cold":
            answer = run([prompt(1000 + turn, tokens)], 1)
        elif case == "no reuse":
            answer = run([prompt(2000 + 24 * turn + i, 6000) for i in range(24)], 32)
        elif case == "decode":
            answer = run([prompt(9000 + 16 * turn + i, 512) for i in range(16)], 256)
        else:
            prompts = eight if case.startswith("eight") else one
            if turn == 0:
                run(prompts, 1)
                time.sleep(1.5)
            if case.endswith("after reset"):
                llm.reset_prefix_cache()
            answer = run(prompts, 1)
        print("ANSWER " + json.dumps(answer), flush=True)


class Engine:
    def __init__(self, kind: str, log: Path) -> None:
        self.kind = kind
        command = [sys.executable, __file__, "--serve", kind, *sys.argv[1:]]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True
        )
        self._read("READY")

    def _read(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise RuntimeError(f"the engine {self.kind!r} ended: see its log")

    def ask(self, case: str, turn: int) -> tuple[float, list[list[int]]]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([case, turn]) + "\n")
        self._process.stdin.flush()
        seconds, tokens = json.loads(self._read("ANSWER"))
        return seconds, tokens

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def measure(engines: list[Engine], case: str, turns: int) -> bool:
    seconds: dict[str, list[float]] = {engine.kind: [] for engine in engines}
    equal = True
    for turn in range(turns + 1):
        first: list[list[int]] | None = None
        for engine in engines:
            took, tokens = engine.ask(case, turn)
            first = first or tokens
            equal &= tokens == first
            if turn > 0:  # the first one warms up
                seconds[engine.kind].append(took)
    for kind, values in seconds.items():
        ratios = [value / alone for value, alone in zip(values, seconds[engines[0].kind], strict=True)]
        print(
            f"RESULT {case}, {kind}: {statistics.median(values):.3f} s ({min(values):.3f}-{max(values):.3f}), of "
            f"{engines[0].kind} {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}), outputs equal {equal}",
            flush=True,
        )
    return equal


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", default="alone,stock,own")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=21000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--memory", type=float, default=0.31)
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--logs", type=Path, default=Path("/tmp"))
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    MODEL.mkdir(exist_ok=True)
    (MODEL / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": arguments.layers}))
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if arguments.serve:
        serve(arguments.serve, arguments)
        return 0
    # One after the other: vLLM measures the memory that is free.
    engines: list[Engine] = []
    try:
        for kind in arguments.engines.split(","):
            engines.append(Engine(kind, arguments.logs / f"engine_{kind}.log"))
        # No generator: each case is measured also after one with unequal outputs.
        return 0 if all([measure(engines, case, arguments.turns) for case in arguments.cases.split(",")]) else 1
    finally:
        for engine in engines:
            engine.close()


if __name__ == "__main__":
    sys.exit(main())
