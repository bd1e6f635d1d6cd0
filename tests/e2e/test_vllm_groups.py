"""The full connector and a model with several KV cache groups: two kinds of attention, one of them with a window.

The same situations as with one group, and those in which the groups differ: prompts and answers longer than the window,
prefixes of which the engine has a part.
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

# Room for one longest prompt in all groups at once, with two steps in flight.
_POOL_BLOCKS = 110
_HYBRID = EngineConfig(flexkv=True, full=True, pool_blocks=_POOL_BLOCKS)
CONFIGURATIONS = [_HYBRID, dataclasses.replace(_HYBRID, in_process=False, async_scheduling=True)]
_EXTENDED = 5 * BLOCK + 3
_LONG_ANSWER = 4 * BLOCK


@pytest.fixture(scope="session")
def baseline(hybrid_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    config = dataclasses.replace(_HYBRID, flexkv=False, full=False)
    return run_engine(config, hybrid_model, situations(), tmp_path_factory.mktemp("hybrid") / "baseline")


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda config: config.name.removesuffix("-flexkv"))
def runs(
    request: pytest.FixtureRequest, hybrid_model: Path, baseline: Results, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    directory = tmp_path_factory.mktemp("hybrid") / "engine"
    return Runs(baseline, run_engine(request.param, hybrid_model, situations(), directory))


def situations() -> list[dict[str, Any]]:
    exact = [
        *sensitivity(),
        *cold_warm_partial(),
        *block_boundaries(),
        *salts(),
        *engine_has_the_beginning(),
        *shared_prefix(),
        *answer_beyond_the_window(),
    ]
    return [*paced(exact), *preemption_storm(), *abort_while_loading()]


def engine_has_the_beginning() -> list[dict[str, Any]]:
    long = prompt("extended", LONG)
    return [
        generate("beginning", [long[:_EXTENDED]]),
        *emptied(),
        generate("whole", [long]),
        *emptied(),
        generate("beginning again", [long[:_EXTENDED]]),
        generate("extended", [long]),
    ]


def shared_prefix() -> list[dict[str, Any]]:
    shared = prompt("shared", SHARED)
    both = [shared + prompt(f"end {i}", 3 * BLOCK + i) for i in range(2)]
    return [generate("shared cold", both), *emptied(), generate("shared warm", both)]


def answer_beyond_the_window() -> list[dict[str, Any]]:
    first = [prompt("conversation", BLOCK + 9)]
    return [
        generate("answer", first, max_tokens=_LONG_ANSWER),
        *emptied(),
        generate("answer warm", first, max_tokens=_LONG_ANSWER),
    ]


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


def test_partial_prefix(runs: Runs) -> None:
    assert_equal_outputs(runs, "partial")
    assert runs.flexkv["partial"].flexkv_hits == SHARED // BLOCK * BLOCK


@pytest.mark.parametrize("length", BOUNDARY_LENGTHS)
def test_block_boundary(runs: Runs, length: int) -> None:
    assert_equal_outputs(runs, f"boundary {length} cold", f"boundary {length} warm")
    assert runs.flexkv[f"boundary {length} warm"].flexkv_hits == whole_blocks(length)


def test_salts_do_not_share(runs: Runs) -> None:
    names = ("salt A cold", "salt B cold", "no salt cold", "salt A warm", "no salt warm")
    assert_equal_outputs(runs, *names)
    expected = whole_blocks(10 * BLOCK + 3)
    assert [runs.flexkv[name].flexkv_hits for name in names] == [0, 0, 0, expected, expected]


def test_prefix_of_which_the_engine_has_the_beginning(runs: Runs) -> None:
    assert_equal_outputs(runs, "beginning", "whole", "beginning again", "extended")
    extended = runs.flexkv["extended"]
    assert extended.engine_hits == whole_blocks(_EXTENDED)
    assert extended.flexkv_hits == whole_blocks(LONG) - extended.engine_hits


def test_requests_that_share_a_prefix(runs: Runs) -> None:
    assert_equal_outputs(runs, "shared cold", "shared warm")
    warm = runs.flexkv["shared warm"]
    assert warm.flexkv_hits + warm.engine_hits == sum(whole_blocks(SHARED + 3 * BLOCK + i) for i in range(2))
    assert warm.flexkv_hits > warm.engine_hits


def test_answer_longer_than_the_window(runs: Runs) -> None:
    assert_equal_outputs(runs, "answer", "answer warm")


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


def test_failed_loads_are_recomputed(hybrid_model: Path, baseline: Results, tmp_path: Path) -> None:
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
    got = run_engine(_HYBRID, hybrid_model, steps, tmp_path / "engine")
    assert [result.outputs for result in got.values()] == [baseline["cold"].outputs] * 3
    assert got["healed"].flexkv_hits == whole_blocks(LONG)
