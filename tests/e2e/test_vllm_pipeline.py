"""Two pipeline stages, each with one of the two layers, and a KV cache in FP8: a block is found when both stages have saved
it, and takes a quarter of the bytes of one in float32."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import Runs
from engine import BLOCK, EngineConfig, run_engine
from flexkv.demo.model import TINY_SHAPE
from scenarios import LONG, SHARED, cold_warm_partial, salts, sensitivity, whole_blocks

_FP8 = (("kv_cache_dtype", "fp8"),)
_CONFIG = EngineConfig(flexkv=True, in_process=False, pipeline_parallel=2, pool_blocks=110, more=_FP8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def runs(directory: Path, tiny_model: Path) -> Runs:
    steps = [*sensitivity(), *cold_warm_partial(), *salts()]
    # One process computes the same as two stages, and starts sooner.
    without = EngineConfig(flexkv=False, pool_blocks=_CONFIG.pool_blocks, more=_FP8)
    baseline = run_engine(without, tiny_model, steps, directory / "baseline")
    ask = [sys.executable, "-m", "flexkv.cli", "status", "--json"]
    status = {"op": "run", "argv": ["sh", "-c", '"$@" > "$0"', str(directory / "status.json"), *ask]}
    return Runs(baseline, run_engine(_CONFIG, tiny_model, [*steps, status], directory / "engine"))


def test_outputs_are_equal(runs: Runs) -> None:
    one, other = runs.baseline["sensitivity"].outputs
    assert one != other
    for name in runs.baseline:
        assert runs.flexkv[name].outputs == runs.baseline[name].outputs, name


def test_hits(runs: Runs) -> None:
    assert runs.flexkv["cold"].flexkv_hits == 0
    for name in ("warm", "warm again"):
        assert runs.flexkv[name].flexkv_hits == whole_blocks(LONG)
    assert runs.flexkv["partial"].flexkv_hits == SHARED // BLOCK * BLOCK
    assert [runs.flexkv[f"salt {name} cold"].flexkv_hits for name in "AB"] == [0, 0]


def test_each_stage_keeps_its_layer_of_every_block(runs: Runs, directory: Path) -> None:
    (node,) = json.loads((directory / "status.json").read_text())["nodes"]
    (space,) = node["spaces"]
    assert space["block_bytes"] == BLOCK * TINY_SHAPE.kv_bytes_per_token // 4
    saved = node["transfers"]["to_host"]
    assert saved["bytes"] == saved["blocks"] * space["block_bytes"] > 0
