"""Both connectors with the embedded node: outputs as without FlexKV, hits from FlexKV where there should be.

One start of the engine goes through all situations; each test looks at one of them.
"""

from __future__ import annotations

import pytest
from conftest import RunBoth, Runs
from engine import BLOCK, EngineConfig
from scenarios import BOUNDARY_LENGTHS, LONG, SHARED, SOAK_ROUNDS, WHOLE_POOL, everything, whole_blocks

# Every load runs beside the engine's steps, however small.
ASYNC_LOADS = (("FLEXKV_SYNC_LOAD_MAX_MB", "0"),)
CONFIGURATIONS = [
    EngineConfig(flexkv=True, in_process=True),
    EngineConfig(flexkv=True, in_process=True, async_scheduling=True),
    EngineConfig(flexkv=True, in_process=False),
    EngineConfig(flexkv=True, in_process=False, async_scheduling=True),
    EngineConfig(flexkv=True, in_process=False, tensor_parallel=2),
    EngineConfig(flexkv=True, in_process=True, environment=ASYNC_LOADS),
    EngineConfig(flexkv=True, in_process=False, async_scheduling=True, environment=ASYNC_LOADS),
    EngineConfig(flexkv=True, in_process=True, full=True),
    EngineConfig(flexkv=True, in_process=True, full=True, environment=ASYNC_LOADS),
]


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda config: config.name.removesuffix("-flexkv"))
def runs(request: pytest.FixtureRequest, run_both: RunBoth) -> Runs:
    return run_both(request.param, everything())


def assert_equal_outputs(runs: Runs, *names: str) -> None:
    for name in names:
        assert runs.flexkv[name].outputs == runs.baseline[name].outputs, name


def test_output_depends_on_the_first_block(runs: Runs) -> None:
    one, other = runs.baseline["sensitivity"].outputs
    assert one != other
    assert_equal_outputs(runs, "sensitivity")


def test_baseline_has_no_external_hits(runs: Runs) -> None:
    assert {name: r.flexkv_hits for name, r in runs.baseline.items() if r.flexkv_hits} == {}


def test_engine_gives_all_blocks_back(runs: Runs) -> None:
    assert [name for name, result in runs.flexkv.items() if result.reset is False] == []


def test_cold(runs: Runs) -> None:
    assert_equal_outputs(runs, "cold")
    assert runs.flexkv["cold"].flexkv_hits == 0


def test_warm(runs: Runs) -> None:
    assert_equal_outputs(runs, "warm", "warm again")
    for name in ("warm", "warm again"):
        assert runs.flexkv[name].engine_hits == 0
        assert runs.flexkv[name].flexkv_hits == whole_blocks(LONG)


def test_partial_prefix(runs: Runs) -> None:
    assert_equal_outputs(runs, "partial")
    assert runs.flexkv["partial"].flexkv_hits == SHARED // BLOCK * BLOCK


@pytest.mark.parametrize("length", BOUNDARY_LENGTHS)
def test_block_boundary(runs: Runs, length: int) -> None:
    assert_equal_outputs(runs, f"boundary {length} cold", f"boundary {length} warm")
    assert runs.flexkv[f"boundary {length} cold"].flexkv_hits == 0
    # A prompt of whole blocks may be served whole or less its last block: some token has to be computed.
    assert whole_blocks(length) <= runs.flexkv[f"boundary {length} warm"].flexkv_hits <= length


def test_salts_do_not_share(runs: Runs) -> None:
    names = ("salt A cold", "salt B cold", "no salt cold", "salt A warm", "no salt warm")
    assert_equal_outputs(runs, *names)
    hits = [runs.flexkv[name].flexkv_hits for name in names]
    expected = whole_blocks(10 * BLOCK + 3)
    assert hits == [0, 0, 0, expected, expected]


def test_prompt_logprobs_skip_reading(runs: Runs) -> None:
    assert_equal_outputs(runs, "before logprobs", "logprobs")
    result = runs.flexkv["logprobs"]
    assert result.flexkv_hits == 0
    assert result.prompt_logprobs[0] == pytest.approx(runs.baseline["logprobs"].prompt_logprobs[0], abs=1e-3)
    assert len(result.prompt_logprobs[0]) == 8 * BLOCK + 9 - 1


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
    # The engine may have cached what the aborted load brought.
    after = runs.flexkv[f"after abort {engine_steps}"]
    assert after.flexkv_hits + after.engine_hits >= whole_blocks(LONG)


def test_whole_pool_is_usable_after_aborts(runs: Runs) -> None:
    assert_equal_outputs(runs, "whole pool")
    assert runs.flexkv["whole pool"].computed == WHOLE_POOL


def test_descriptors_do_not_grow(runs: Runs) -> None:
    rounds = [runs.flexkv[f"soak {i}"] for i in range(SOAK_ROUNDS)]
    assert_equal_outputs(runs, *(f"soak {i}" for i in range(SOAK_ROUNDS)))
    assert all(result.flexkv_hits > 0 for result in rounds[1:])
    assert rounds[-1].descriptors <= rounds[1].descriptors
