"""The scenarios: lists of steps (see engine_child.py). Situations do not disturb one another: each has its own prompts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from engine import BLOCK

Step = dict[str, Any]
_VOCABULARY = 512
_FIRST_ORDINARY_TOKEN = 4
ANSWER = 12
BOUNDARY_LENGTHS = (6 * BLOCK - 1, 6 * BLOCK, 6 * BLOCK + 1)
LONG = 20 * BLOCK + 7
SHARED = 9 * BLOCK + 5
WHOLE_POOL = 1000
SOAK_ROUNDS = 12


def prompt(seed: str, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(_FIRST_ORDINARY_TOKEN, _VOCABULARY) for _ in range(length)]


def whole_blocks(tokens: int) -> int:
    """Prompt tokens that a cache can serve at least: whole blocks, the last token left for the engine to compute."""
    return (tokens - 1) // BLOCK * BLOCK


def generate(name: str, prompts: list[list[int]], max_tokens: int = ANSWER, **more: Any) -> Step:
    return {"op": "generate", "name": name, "prompts": prompts, "max_tokens": max_tokens} | more


def emptied() -> list[Step]:
    """The engine's own cache is empty afterwards, and what was saved before is visible in FlexKV."""
    return [{"op": "settle", "seconds": 0.3}, {"op": "reset"}]


def paced(steps: list[Step]) -> list[Step]:
    """What is saved is kept, however busy the machine."""
    return [{"op": "pace", "on": True}, *steps, {"op": "pace", "on": False}]


def everything() -> list[Step]:
    """All situations that one engine can go through."""
    return [
        *sensitivity(),
        *cold_warm_partial(),
        *block_boundaries(),
        *salts(),
        *prompt_logprobs(),
        *preemption_storm(),
        *abort_while_loading(),
        *soak(),
    ]


def sensitivity() -> list[Step]:
    """Two prompts that differ in their first block only: equal answers would mean that the KV does not matter."""
    tail = prompt("sensitivity", 8 * BLOCK)
    return [generate("sensitivity", [prompt("one", BLOCK) + tail, prompt("other", BLOCK) + tail])]


def cold_warm_partial() -> list[Step]:
    long = prompt("long", LONG)
    return [
        generate("cold", [long]),
        *emptied(),
        generate("warm", [long]),
        *emptied(),
        generate("partial", [long[:SHARED] + prompt("another end", 200)]),
        *emptied(),
        generate("warm again", [long]),
    ]


def block_boundaries() -> list[Step]:
    prompts = [prompt(f"boundary {length}", length) for length in BOUNDARY_LENGTHS]
    return [
        *(generate(f"boundary {len(p)} cold", [p]) for p in prompts),
        *(step for p in prompts for step in (*emptied(), generate(f"boundary {len(p)} warm", [p]))),
    ]


def salts() -> list[Step]:
    prompts = [prompt("salt", 10 * BLOCK + 3)]
    return [
        generate("salt A cold", prompts, salt="A"),
        *emptied(),
        generate("salt B cold", prompts, salt="B"),
        *emptied(),
        generate("no salt cold", prompts),
        *emptied(),
        generate("salt A warm", prompts, salt="A"),
        *emptied(),
        generate("no salt warm", prompts),
    ]


def prompt_logprobs() -> list[Step]:
    """They need every prompt token computed: vLLM asks nobody for the prefix."""
    prompts = [prompt("logprobs", 8 * BLOCK + 9)]
    return [
        generate("before logprobs", prompts),
        *emptied(),
        generate("logprobs", prompts, prompt_logprobs=1),
    ]


def preemption_storm() -> list[Step]:
    """Twelve requests that together need more than twice the pool, thrice."""
    prompts = [prompt(f"storm {i}", 5 * BLOCK - 7 * i) for i in range(12)]
    return [step for i in range(3) for step in (generate(f"storm {i}", prompts, max_tokens=56), *emptied())]


def abort_while_loading() -> list[Step]:
    """Aborts at once and after a step or two; a block that stays held would show in the reset or starve the last prompt."""
    long = prompt("aborted", LONG)
    steps: list[Step] = [generate("before abort", [long])]
    for engine_steps in (0, 1, 2):
        steps += [
            *emptied(),
            {"op": "abort", "prompts": [long], "max_tokens": ANSWER, "engine_steps": engine_steps},
            generate(f"after abort {engine_steps}", [long, prompt(f"beside {engine_steps}", 100)]),
        ]
    return [*steps, *emptied(), generate("whole pool", [prompt("whole pool", WHOLE_POOL)])]


def soak() -> list[Step]:
    prompts = [prompt(f"soak {i}", 6 * BLOCK) for i in range(3)]
    return [step for i in range(SOAK_ROUNDS) for step in (*emptied(), generate(f"soak {i}", prompts, max_tokens=2))]


def adapters(directories: dict[str, Path]) -> list[Step]:
    """The same prompt for the base model and for two adapters, first cold, then from the cache."""
    prompts = [prompt("adapters", 10 * BLOCK + 3)]
    steps: list[Step] = [generate("base cold", prompts)]
    loras = {
        name: {"lora": {"name": name, "id": i + 1, "path": str(path)}}
        for i, (name, path) in enumerate(directories.items())
    }
    steps += [step for name, lora in loras.items() for step in (*emptied(), generate(f"{name} cold", prompts, **lora))]
    steps += [step for name, lora in loras.items() for step in (*emptied(), generate(f"{name} warm", prompts, **lora))]
    return [*steps, *emptied(), generate("base warm", prompts)]
