"""A router that hears vLLM's KV events knows what FlexKV keeps: after saves, evictions, drives, resets and restarts."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from engine import BLOCK, EngineConfig, run_engine
from scenarios import LONG, emptied, generate, prompt
from test_vllm_ssd import prompts, ssd

_HERE = Path(__file__).parent


def publishing(config: EngineConfig, directory: Path) -> EngineConfig:
    directory.mkdir(exist_ok=True)
    return dataclasses.replace(config, kv_events=str(directory))


def compare(config: EngineConfig, out: Path) -> list[dict[str, Any]]:
    """What was saved is told in the engine's next step, so there is one that saves nothing."""
    script = [sys.executable, "-P", str(_HERE / "kv_replica.py"), config.replay_endpoint]
    return [
        {"op": "settle", "seconds": 0.3},
        generate(f"next step {out.name}", [prompt("short", 5)], max_tokens=1),
        {"op": "run", "argv": [*script, str(out)]},
    ]


def told(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    assert result["replica"] == result["node"]
    assert result["as_on_gpu"]
    return result


@pytest.mark.parametrize("full", [False, True], ids=["stock", "full"])
def test_replica_equals_the_nodes_index(tiny_model: Path, tmp_path: Path, full: bool) -> None:
    config = EngineConfig(flexkv=True, full=full, environment=(("FLEXKV_CPU_CACHE_GB", "2MB"),))
    config = publishing(config, tmp_path / "sockets")
    steps = [
        generate("first", [prompt("first", LONG)]),
        *compare(config, tmp_path / "saved"),
        *emptied(),
        generate("salted", [prompt("first", 3 * BLOCK)], salt="pepper"),
        # Six prompts of 20 blocks do not fit into 64.
        *(generate(f"many {i}", [ids]) for i, ids in enumerate(prompts())),
        *compare(config, tmp_path / "evicted"),
        {"op": "reset", "connector": True},
        *compare(config, tmp_path / "reset"),
        generate("again", [prompt("first", LONG)]),
        *compare(config, tmp_path / "again"),
    ]
    run_engine(config, tiny_model, steps, tmp_path / "engine")
    blocks = (LONG + 12 - 1) // BLOCK
    assert told(tmp_path / "saved")["node"]["CPU"] == blocks
    evicted = told(tmp_path / "evicted")
    assert evicted["ever"]["CPU"] > evicted["node"]["CPU"] > 40
    # vLLM's own connector is not told of resets.
    assert told(tmp_path / "reset")["node"]["CPU"] == (0 if full else evicted["node"]["CPU"])
    assert told(tmp_path / "again")["node"]["CPU"] >= blocks
