"""Engines that give their KV memory away and get other memory, and engines whose weights change while they run: outputs are
those of an engine without FlexKV that does the same. vLLM has no sleep mode on CPUs: the memory is moved by hand there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from conftest import RunBoth
from engine import EngineConfig, Results, run_engine
from scenarios import LONG, emptied, generate, prompt, whole_blocks
from test_vllm_ssd import ssd

IN_PROCESS = EngineConfig(flexkv=True, full=True)
MULTI_PROCESS = EngineConfig(flexkv=True, full=True, in_process=False)
TWO_RANKS = EngineConfig(flexkv=True, full=True, in_process=False, tensor_parallel=2)
EMPTY_ENGINE_CACHE = {"op": "reset"}


def ids(config: EngineConfig) -> str:
    return config.name.removesuffix("-flexkv")


def assert_equal_outputs(results: Results, expected: Results) -> None:
    assert {name: result.outputs for name, result in results.items()} == {
        name: result.outputs for name, result in expected.items()
    }


@pytest.mark.parametrize("config", [IN_PROCESS, TWO_RANKS], ids=ids)
def test_kv_memory_goes_and_comes_back_elsewhere(run_both: RunBoth, config: EngineConfig) -> None:
    kept, other = prompt("kept", LONG), prompt("other", LONG)
    without_engine = [
        {"op": "sleep", "engine": False},
        {"op": "wake", "engine": False},
        {"op": "settle", "seconds": 0.3},
    ]
    steps = [
        generate("cold", [kept]),
        *emptied(),
        *without_engine,
        generate("kept over a sleep", [kept]),
        generate("saves under way", [other]),
        EMPTY_ENGINE_CACHE,
        *without_engine,
        generate("after saves that failed or not", [other]),
        *emptied(),
        generate("saved after a sleep", [other]),
        # vLLM's own way, which resets the connector.
        {"op": "sleep"},
        {"op": "wake"},
        {"op": "settle", "seconds": 0.3},
        generate("after vLLM's sleep", [kept]),
        *emptied(),
        generate("saved after vLLM's sleep", [kept]),
    ]
    runs = run_both(config, steps)
    assert_equal_outputs(runs.flexkv, runs.baseline)
    hits = {name: result.flexkv_hits for name, result in runs.flexkv.items()}
    assert hits["kept over a sleep"] == whole_blocks(LONG)
    assert hits["saved after a sleep"] == whole_blocks(LONG)
    assert hits["after vLLM's sleep"] == 0
    assert hits["saved after vLLM's sleep"] == whole_blocks(LONG)


def weights_steps(connector: bool, settle: bool) -> list[dict[str, Any]]:
    wait = [{"op": "settle", "seconds": 0.3}] if settle else []
    return [
        generate("old weights", [prompt("weights", LONG)]),
        *wait,
        {"op": "weights"},
        {"op": "reset", "connector": connector},
        generate("new weights", [prompt("weights", LONG)]),
        *emptied(),
        generate("new weights again", [prompt("weights", LONG)]),
    ]


@pytest.fixture(scope="module")
def fresh_with_new_weights(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What an engine answers that never had other weights."""
    steps = [{"op": "weights"}, generate("new weights", [prompt("weights", LONG)])]
    directory = tmp_path_factory.mktemp("fresh") / "engine"
    return run_engine(EngineConfig(flexkv=False), tiny_model, steps, directory)["new weights"].outputs


@pytest.mark.parametrize(
    ("config", "settle"),
    [(IN_PROCESS, True), (IN_PROCESS, False), (MULTI_PROCESS, False)],
    ids=["in_process-saved", "in_process-saves_under_way", "multi_process-saves_under_way"],
)
def test_a_reset_makes_blocks_of_old_weights_unreachable(
    tiny_model: Path,
    tmp_path: Path,
    fresh_with_new_weights: list[list[int]],
    config: EngineConfig,
    settle: bool,
) -> None:
    results = run_engine(config, tiny_model, weights_steps(True, settle), tmp_path / "engine")
    assert results["old weights"].outputs != fresh_with_new_weights
    assert results["new weights"].outputs == fresh_with_new_weights
    assert results["new weights"].flexkv_hits == 0
    assert results["new weights again"].outputs == fresh_with_new_weights
    assert results["new weights again"].flexkv_hits == whole_blocks(LONG)


def test_without_a_reset_they_are_served(
    tiny_model: Path, tmp_path: Path, fresh_with_new_weights: list[list[int]]
) -> None:
    """What the tests above can see."""
    results = run_engine(IN_PROCESS, tiny_model, weights_steps(False, True), tmp_path / "engine")
    assert results["new weights"].flexkv_hits == whole_blocks(LONG)
    assert results["new weights"].outputs != fresh_with_new_weights


def test_blocks_of_old_and_new_weights_on_drives_go_to_those_who_have_these_weights(
    tiny_model: Path, tmp_path: Path, fresh_with_new_weights: list[list[int]]
) -> None:
    """The engine that starts again has the weights as stored, and finds none of those that changed in place."""
    written = {"op": "settle", "seconds": 1.0}
    steps = [*weights_steps(True, True)[:1], written, *weights_steps(True, True)[2:], written]
    config = dataclasses.replace(IN_PROCESS, environment=ssd(tmp_path / "ssd"))
    first = run_engine(config, tiny_model, steps, tmp_path / "first")
    assert first["new weights"].outputs == fresh_with_new_weights
    assert first["new weights again"].outputs == fresh_with_new_weights
    again = [generate("old weights", [prompt("weights", LONG)])]
    second = run_engine(config, tiny_model, again, tmp_path / "second")
    assert second["old weights"].outputs == first["old weights"].outputs
    assert second["old weights"].flexkv_hits == 0
