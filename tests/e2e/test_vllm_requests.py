"""Kinds of requests: prompt embeddings, several answers to one prompt, beam search; and loads that fail where vLLM is told to
end their requests. All through one engine."""

from __future__ import annotations

import pytest
from conftest import RunBoth, Runs
from engine import BLOCK, EngineConfig
from scenarios import ANSWER, Step, emptied, generate, prompt, whole_blocks

_CONFIG = EngineConfig(
    flexkv=True, full=True, pool_blocks=110, failure_policy="fail", more=(("enable_prompt_embeds", True),)
)
_LENGTH = 4 * BLOCK + 5


def _embeds(name: str, *seeds: int) -> Step:
    return generate(name, [[0] * _LENGTH for _ in seeds], embeds=list(seeds))


def _steps() -> list[Step]:
    several, beams, failing = (prompt(name, _LENGTH) for name in ("several", "beams", "failing"))
    beam = {"op": "beam", "prompts": [beams], "max_tokens": ANSWER}
    return [
        _embeds("embeddings", 1),
        *emptied(),
        _embeds("other embeddings", 2),
        *emptied(),
        generate("the token they stand in for", [[0] * _LENGTH]),
        *emptied(),
        _embeds("embeddings again", 1, 2),
        *emptied(),
        generate("several", [several], n=3),
        *emptied(),
        generate("several again", [several], n=3),
        *emptied(),
        beam | {"name": "beams"},
        *emptied(),
        beam | {"name": "beams again"},
        generate("before", [failing]),
        *emptied(),
        {"op": "fail_loads", "on": True},
        generate("failing", [failing, prompt("beside", _LENGTH)]),
        {"op": "fail_loads", "on": False},
        *emptied(),
        generate("healed", [failing]),
    ]


@pytest.fixture(scope="module")
def runs(run_both: RunBoth) -> Runs:
    return run_both(_CONFIG, _steps())


def test_outputs_are_equal(runs: Runs) -> None:
    for name in runs.baseline:
        if name != "failing":
            assert runs.flexkv[name].outputs == runs.baseline[name].outputs, name


def test_embeddings_never_match_by_the_tokens_they_stand_in_for(runs: Runs) -> None:
    names = ("embeddings", "other embeddings", "the token they stand in for")
    outputs = [runs.baseline[name].outputs for name in names]
    assert outputs[0] != outputs[1] != outputs[2] != outputs[0]
    assert [runs.flexkv[name].flexkv_hits for name in names] == [0, 0, 0]


def test_equal_embeddings_are_found(runs: Runs) -> None:
    assert runs.flexkv["embeddings again"].flexkv_hits == 2 * whole_blocks(_LENGTH)


def test_several_answers(runs: Runs) -> None:
    assert len({tuple(answer) for answer in runs.baseline["several"].outputs}) == 3
    assert runs.flexkv["several"].flexkv_hits == 0
    again = runs.flexkv["several again"]
    assert again.flexkv_hits + again.engine_hits == 3 * whole_blocks(_LENGTH)
    assert again.flexkv_hits > 0


def test_beam_search(runs: Runs) -> None:
    assert len(runs.baseline["beams"].outputs) == 2
    assert runs.flexkv["beams again"].flexkv_hits > 0


def test_a_failed_load_ends_its_request_and_no_other(runs: Runs) -> None:
    """As `kv_load_failure_policy` "fail" asks."""
    failing = runs.flexkv["failing"]
    assert failing.errors == 1
    assert failing.outputs == [[], runs.baseline["failing"].outputs[1]]
    assert runs.flexkv["healed"].flexkv_hits == whole_blocks(_LENGTH)
