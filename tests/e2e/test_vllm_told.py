"""What an engine's log says of settings and nodes that are not as they should be: once, in plain words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from engine import EngineConfig, EngineFailure, run_engine
from scenarios import LONG, generate, prompt


def _config(*environment: tuple[str, str]) -> EngineConfig:
    return EngineConfig(flexkv=True, environment=environment)


def test_a_node_that_is_not_running(tiny_model: Path, tmp_path: Path) -> None:
    config = _config(("FLEXKV_NODE", "nosuch"), ("FLEXKV_NO_SUCH_SETTING", "1"))
    got = run_engine(config, tiny_model, [generate("first", [prompt("told", LONG)])], tmp_path / "engine")
    assert got["first"].computed == LONG
    log = (tmp_path / "engine/engine.log").read_text()
    (line,) = [line for line in log.splitlines() if "is not running" in line]
    socket = tmp_path / "engine/run/nosuch.sock"
    assert line.endswith(
        f"FlexKV: node 'nosuch' is not running (looked for {socket}); serving without it until it comes"
    )
    (line,) = [line for line in log.splitlines() if "FLEXKV_NO_SUCH_SETTING" in line]
    assert re.match(r"W \d\d-\d\d [\d:.]+ \[FLEXKV \d+\] FlexKV: ", line), "in our form, not bare"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("lots", "cpu_cache_gb: wrong value 'lots' from env "), ("900T", "cpu_cache_gb: 900 TiB from env ")],
)
def test_a_size_that_cannot_be(tiny_model: Path, tmp_path: Path, value: str, expected: str) -> None:
    with pytest.raises(EngineFailure):
        run_engine(_config(("FLEXKV_CPU_CACHE_GB", value)), tiny_model, [], tmp_path / "engine")
    log = (tmp_path / "engine/engine.log").read_text()
    lines = [line for line in log.splitlines() if re.match(r"E \d\d-\d\d .* FlexKV: ", line)]
    assert len(lines) == 1, log[-4000:]
    assert expected in lines[0]
