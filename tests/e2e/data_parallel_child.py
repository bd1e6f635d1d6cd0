"""The program of a vLLM with data-parallel ranks: `data_parallel_child.py SPEC` carries out the spec's steps with `AsyncLLM`.

Steps are objects with `op`: `settle` and `run` as in engine_child.py, and `generate`: the data-parallel rank `rank` answers
`prompt`, greedy; the tokens are kept under `name`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from engine_child import Engine, settle


async def main(spec: dict[str, Any]) -> None:
    from vllm.config import KVEventsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = spec["arguments"]
    arguments["kv_events_config"] = KVEventsConfig(**arguments["kv_events_config"])
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    results: dict[str, list[int]] = {}
    for step in spec["steps"]:
        match step["op"]:
            case "generate":
                results[step["name"]] = await answer(engine, step)
            case "settle":
                settle(step["seconds"])
            case "run":
                Engine.run(step)
    engine.shutdown(timeout=60)
    Path(spec["results"]).write_text(json.dumps(results))


async def answer(engine: Any, step: dict[str, Any]) -> list[int]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=step["max_tokens"], ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": step["prompt"]}
    async for output in engine.generate(prompt, sampling, step["name"], data_parallel_rank=step["rank"]):
        said = list(output.outputs[0].token_ids)
    return said


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
