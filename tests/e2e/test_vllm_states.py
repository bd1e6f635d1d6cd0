"""Models with states (here short convolutions) run as if FlexKV were not there, and it says so in one line."""

from __future__ import annotations

from pathlib import Path

from engine import EngineConfig, run_engine
from scenarios import cold_warm_partial, sensitivity
from state_model import make_state_model


def test_a_model_with_states_is_left_alone(tmp_path: Path) -> None:
    model = make_state_model(tmp_path / "model")
    steps = [*sensitivity(), *cold_warm_partial()]
    without = run_engine(EngineConfig(flexkv=False, pool_blocks=110), model, steps, tmp_path / "baseline")
    got = run_engine(EngineConfig(flexkv=True, full=True, pool_blocks=110), model, steps, tmp_path / "engine")
    one, other = without["sensitivity"].outputs
    assert one != other
    for name in without:
        assert got[name].outputs == without[name].outputs, name
        assert got[name].flexkv_hits == 0, name
    log = (tmp_path / "engine/engine.log").read_text()
    lines = [line for line in log.splitlines() if "FlexKV" in line and "not used for this model" in line]
    assert len(lines) == 1, log[-3000:]
