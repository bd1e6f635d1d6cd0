"""LoRA adapters: the same prompt for the base model and for two adapters never shares KV."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import RunBoth, Runs
from engine import BLOCK, EngineConfig
from scenarios import adapters, whole_blocks


@pytest.fixture(scope="module")
def runs(run_both: RunBoth, lora_adapters: dict[str, Path]) -> Runs:
    return run_both(EngineConfig(flexkv=True, lora=True), adapters(lora_adapters))


def test_adapters_change_the_output(runs: Runs) -> None:
    base, a, b = (runs.baseline[f"{name} cold"].outputs for name in ("base", "A", "B"))
    assert base != a
    assert base != b
    assert a != b


def test_outputs_are_equal(runs: Runs) -> None:
    for name in runs.baseline:
        assert runs.flexkv[name].outputs == runs.baseline[name].outputs, name


def test_no_cross_hit(runs: Runs) -> None:
    assert [runs.flexkv[f"{name} cold"].flexkv_hits for name in ("base", "A", "B")] == [0, 0, 0]


def test_each_hits_its_own(runs: Runs) -> None:
    expected = whole_blocks(10 * BLOCK + 3)
    assert [runs.flexkv[f"{name} warm"].flexkv_hits for name in ("base", "A", "B")] == [expected] * 3
