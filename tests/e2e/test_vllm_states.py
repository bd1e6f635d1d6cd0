"""The full connector and a model some of whose layers keep a state (docs/decisions/0026): short convolutions.

A hit needs the state after its last token. The engine has complete ones where its steps end and before the end of a prompt.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from conftest import Runs
from engine import BLOCK, EngineConfig, Results, run_engine
from scenarios import (
    BOUNDARY_LENGTHS,
    LONG,
    SHARED,
    WHOLE_POOL,
    abort_while_loading,
    block_boundaries,
    cold_warm_partial,
    emptied,
    generate,
    paced,
    preemption_storm,
    prompt,
    salts,
    sensitivity,
    whole_blocks,
)
from state_model import make_convolution_model

# vLLM's own rotary embedding for CPUs (0.32) mixes up the tokens of a step for this model: what it computes would depend on
# how prompts are cut.
_EXACT = (("enable_prefix_caching", True), ("compilation_config", {"custom_ops": ["none"]}))
# Room for one longest prompt in all groups at once, with two steps in flight.
_STATES = EngineConfig(flexkv=True, full=True, pool_blocks=46, more=_EXACT)
_APART = dataclasses.replace(_STATES, in_process=False, async_scheduling=True)
_BEGINNING = 5 * BLOCK + 3
_LONG_ANSWER = 4 * BLOCK


def situations() -> list[dict[str, Any]]:
    long = prompt("extended", LONG)
    shared = prompt("shared", SHARED)
    both = [shared + prompt(f"end {i}", 3 * BLOCK + i) for i in range(2)]
    exact = [
        *sensitivity(),
        *cold_warm_partial(),
        *block_boundaries(),
        *salts(),
        generate("beginning", [long[:_BEGINNING]]),
        *emptied(),
        generate("whole", [long]),
        *emptied(),
        generate("beginning again", [long[:_BEGINNING]]),
        generate("extended", [long]),
        generate("shared cold", both),
        *emptied(),
        generate("shared warm", both),
        *conversation(),
    ]
    return [*paced(exact), *preemption_storm(), *abort_while_loading()]


def conversation() -> list[dict[str, Any]]:
    return [
        generate("answer", [prompt("conversation", BLOCK + 9)], max_tokens=_LONG_ANSWER),
        *emptied(),
        generate("answered", [prompt("and then", BLOCK)], after="answer"),
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_convolution_model(tmp_path_factory.mktemp("convolutions"))


@pytest.fixture(scope="module")
def baseline(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    config = dataclasses.replace(_STATES, flexkv=False, full=False)
    return run_engine(config, model, situations(), tmp_path_factory.mktemp("states") / "baseline")


@pytest.fixture(scope="module", params=[_STATES, _APART], ids=lambda config: config.name.removesuffix("-flexkv"))
def runs(
    request: pytest.FixtureRequest, model: Path, baseline: Results, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    directory = tmp_path_factory.mktemp("states") / "engine"
    return Runs(baseline, run_engine(request.param, model, situations(), directory, timeout=600))


def assert_equal_outputs(runs: Runs, *names: str) -> None:
    for name in names:
        assert runs.flexkv[name].outputs == runs.baseline[name].outputs, name


def test_output_depends_on_the_first_block(runs: Runs) -> None:
    one, other = runs.baseline["sensitivity"].outputs
    assert one != other
    assert_equal_outputs(runs, "sensitivity")


def test_engine_gives_all_blocks_back(runs: Runs) -> None:
    assert [name for name, result in runs.flexkv.items() if result.reset is False] == []


def test_cold_and_warm(runs: Runs) -> None:
    assert_equal_outputs(runs, "cold", "warm", "warm again")
    assert runs.flexkv["cold"].flexkv_hits == 0
    for name in ("warm", "warm again"):
        assert runs.flexkv[name].engine_hits == 0
        assert runs.flexkv[name].flexkv_hits == whole_blocks(LONG)


def test_a_prefix_whose_end_has_no_state_is_computed(runs: Runs) -> None:
    assert_equal_outputs(runs, "partial")
    assert runs.flexkv["partial"].flexkv_hits == 0


@pytest.mark.parametrize("length", BOUNDARY_LENGTHS)
def test_block_boundary(runs: Runs, length: int) -> None:
    assert_equal_outputs(runs, f"boundary {length} cold", f"boundary {length} warm")
    assert runs.flexkv[f"boundary {length} warm"].flexkv_hits == whole_blocks(length)


def test_salts_do_not_share(runs: Runs) -> None:
    names = ("salt A cold", "salt B cold", "no salt cold", "salt A warm", "no salt warm")
    assert_equal_outputs(runs, *names)
    expected = whole_blocks(10 * BLOCK + 3)
    assert [runs.flexkv[name].flexkv_hits for name in names] == [0, 0, 0, expected, expected]


def test_a_prompt_that_goes_on_where_another_one_ended(runs: Runs) -> None:
    assert_equal_outputs(runs, "beginning", "whole", "beginning again", "extended")
    assert runs.flexkv["whole"].flexkv_hits == whole_blocks(_BEGINNING)
    extended = runs.flexkv["extended"]
    assert extended.engine_hits == whole_blocks(_BEGINNING)
    assert extended.flexkv_hits == whole_blocks(LONG) - extended.engine_hits


def test_requests_that_share_a_prefix(runs: Runs) -> None:
    assert_equal_outputs(runs, "shared cold", "shared warm")
    warm = runs.flexkv["shared warm"]
    assert warm.flexkv_hits + warm.engine_hits == sum(whole_blocks(SHARED + 3 * BLOCK + i) for i in range(2))
    assert warm.flexkv_hits > warm.engine_hits


# By default vLLM keeps, and tells of, the state before the end of a prompt only.
def test_an_answer_is_computed_again(runs: Runs) -> None:
    assert_equal_outputs(runs, "answer", "answered")
    assert runs.flexkv["answered"].flexkv_hits == BLOCK


def test_states_of_an_answer_are_kept_where_vllm_keeps_them(model: Path, baseline: Results, tmp_path: Path) -> None:
    keeps_all = dataclasses.replace(_STATES, more=(*_EXACT, ("prefix_cache_retention_interval", None)))
    got = run_engine(keeps_all, model, conversation(), tmp_path / "engine")
    assert [got[name].outputs for name in got] == [baseline[name].outputs for name in got]
    # The last token of an answer is never computed.
    assert got["answered"].flexkv_hits == whole_blocks(BLOCK + 9 + _LONG_ANSWER)


def test_preemption_storm(runs: Runs) -> None:
    names = [f"storm {i}" for i in range(3)]
    assert_equal_outputs(runs, *names)
    for name in names:
        assert runs.flexkv[name].preemptions > 0, "the pool was too large to be a storm"
    for name in names[1:]:
        assert runs.flexkv[name].flexkv_hits > 0


@pytest.mark.parametrize("engine_steps", [0, 1, 2])
def test_abort_while_loading(runs: Runs, engine_steps: int) -> None:
    assert_equal_outputs(runs, "before abort", f"after abort {engine_steps}")
    after = runs.flexkv[f"after abort {engine_steps}"]
    assert after.flexkv_hits + after.engine_hits >= whole_blocks(LONG)


def test_whole_pool_is_usable_after_aborts(runs: Runs) -> None:
    assert_equal_outputs(runs, "whole pool")
    assert runs.flexkv["whole pool"].computed == WHOLE_POOL


def test_failed_loads_are_recomputed(model: Path, baseline: Results, tmp_path: Path) -> None:
    long = prompt("long", LONG)  # also what `cold_warm_partial` runs
    steps = [
        generate("cold", [long]),
        *emptied(),
        {"op": "fail_loads", "on": True},
        generate("failing", [long]),
        {"op": "fail_loads", "on": False},
        *emptied(),
        generate("healed", [long]),
    ]
    got = run_engine(_STATES, model, steps, tmp_path / "engine")
    assert [result.outputs for result in got.values()] == [baseline["cold"].outputs] * 3
    assert got["healed"].flexkv_hits == whole_blocks(LONG)


# ---- what makes it never wrong: each rule broken once

_ENDS_IN_A_BLOCK = 20 * BLOCK
# What is computed after a hit begins with the state, and is the answer.
_ONE_TOKEN_MORE = _ENDS_IN_A_BLOCK + 1


def _wrong_and_hits(got: Results, count: int) -> tuple[int, int]:
    """How many of the warm answers differ from the cold ones; and tokens found."""
    pairs = [(got[f"cold {i}"], got[f"warm {i}"]) for i in range(count)]
    return sum(cold.outputs != warm.outputs for cold, warm in pairs), sum(warm.flexkv_hits for _, warm in pairs)


def _warm(prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [step for i, ids in enumerate(prompts) for step in (*emptied(), generate(f"warm {i}", [ids]))]


def test_a_state_is_that_of_exactly_the_tokens_that_its_name_is_of(model: Path, tmp_path: Path) -> None:
    prompts = [prompt(f"named {i}", _ONE_TOKEN_MORE) for i in range(4)]
    longer = [ids + prompt(f"behind {i}", BLOCK) for i, ids in enumerate(prompts)]
    steps = [
        {"op": "spoil_states", "how": "named after the block before"},
        *(generate(f"cold {i}", [ids]) for i, ids in enumerate(prompts)),
        *(generate(f"longer {i}", [ids]) for i, ids in enumerate(longer)),
        *_warm(prompts),
    ]
    wrong, hits = _wrong_and_hits(run_engine(_STATES, model, steps, tmp_path / "engine"), 4)
    assert hits == 4 * _ENDS_IN_A_BLOCK
    assert wrong > 0


def test_a_save_is_called_off_by_the_step_that_overwrites_its_state(model: Path, tmp_path: Path) -> None:
    prompts = [prompt(f"late {i}", _ONE_TOKEN_MORE) for i in range(8)]
    late = {"op": "spoil_states", "how": "saved late"}
    never = {"op": "spoil_states", "how": "never called off"}
    runs = {}
    for name, spoilt in (("right", [late]), ("wrong", [late, never])):
        steps = [*spoilt, *(generate(f"cold {i}", [ids]) for i, ids in enumerate(prompts))]
        # Some are held back for ever: nothing would settle before they run out of time.
        steps += [step for i, ids in enumerate(prompts) for step in ({"op": "reset"}, generate(f"warm {i}", [ids]))]
        runs[name] = _wrong_and_hits(run_engine(_STATES, model, steps, tmp_path / name), len(prompts))
    assert runs["right"][0] == 0
    assert runs["wrong"][0] > 0
