"""Pooling models: those that need only the last token's state are served, those that need all tokens are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import RunBoth
from engine import BLOCK, MAX_TOKENS, EngineConfig, run_engine
from scenarios import Step, emptied, prompt, whole_blocks

_LENGTH = 6 * BLOCK + 3


def _config(pooling: str) -> EngineConfig:
    more = (
        ("runner", "pooling"),
        ("convert", "embed"),
        ("pooler_config", {"seq_pooling_type": pooling}),
        ("max_num_batched_tokens", MAX_TOKENS),  # the mean needs a prompt in one step
    )
    return EngineConfig(flexkv=True, full=True, more=more)


def _steps() -> list[Step]:
    embed = {"op": "embed", "prompts": [prompt("pooled", _LENGTH)]}
    return [embed | {"name": "cold"}, *emptied(), embed | {"name": "warm"}]


def test_the_last_token(run_both: RunBoth) -> None:
    runs = run_both(_config("LAST"), _steps())
    for name in ("cold", "warm"):
        assert runs.flexkv[name].vectors[0] == pytest.approx(runs.baseline[name].vectors[0], abs=1e-5)
    assert (runs.flexkv["cold"].flexkv_hits, runs.flexkv["warm"].flexkv_hits) == (0, whole_blocks(_LENGTH))


def test_the_mean_of_all_tokens(tiny_model: Path, tmp_path: Path) -> None:
    got = run_engine(_config("MEAN"), tiny_model, _steps(), tmp_path / "engine")
    assert got["warm"].vectors == got["cold"].vectors
    assert got["warm"].flexkv_hits == 0
    log = (tmp_path / "engine/engine.log").read_text()
    (line,) = [line for line in log.splitlines() if "FlexKV: not used for this model" in line]
    assert line.endswith("its prompts have to be computed whole (vLLM supports no prefix caching for it)")
