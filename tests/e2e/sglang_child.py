"""One SGLang engine on the CPU: takes steps as JSON lines, answers each with a JSON line. Run by test_sglang.py."""

from __future__ import annotations

import json
import sys
from typing import Any

import sglang


def _generate(engine: Any, prompts: list[list[int]], max_tokens: int, more: dict[str, Any]) -> list[dict[str, Any]]:
    sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
    outputs = engine.generate(input_ids=prompts, sampling_params=sampling, **more)
    return [
        {"tokens": one["output_ids"], "cached": one["meta_info"]["cached_tokens"], "meta": str(one["meta_info"])}
        for one in outputs
    ]


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr
    engine = sglang.Engine(**json.loads(sys.argv[1]))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        step = json.loads(line)
        if step["do"] == "generate":
            answer: Any = _generate(engine, step["prompts"], step["max_tokens"], step.get("more", {}))
        elif step["do"] == "flush":
            answer = engine.flush_cache().success
        print(json.dumps(answer), file=answers, flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
