"""A router that hears vLLM's KV events knows what FlexKV keeps: after saves, evictions, drives, resets and restarts."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine import BLOCK, EngineConfig, run_engine
from scenarios import LONG, adapters, emptied, generate, prompt
from test_vllm_daemon import serve_argv
from test_vllm_ssd import prompts, ssd

_HERE = Path(__file__).parent


def publishing(config: EngineConfig, directory: Path) -> EngineConfig:
    directory.mkdir(exist_ok=True)
    return dataclasses.replace(config, kv_events=str(directory))


def compare(config: EngineConfig, out: Path, replay: str = "") -> list[dict[str, Any]]:
    """What was saved is told in the engine's next step, so there is one that saves nothing."""
    script = [sys.executable, "-P", str(_HERE / "kv_replica.py"), replay or config.replay_endpoint]
    return [
        {"op": "settle", "seconds": 0.3},
        generate(f"next step {out.name}", [prompt("short", 5)], max_tokens=1),
        {"op": "run", "argv": [*script, str(out)]},
    ]


def told(path: Path, on_gpu: bool = True) -> dict[str, Any]:
    """What was compared, which must agree. `on_gpu`: also with what the same stream said of the engine's own blocks."""
    result = json.loads(path.read_text())
    assert result["replica"] == result["node"]
    assert result["as_on_gpu"] or not on_gpu
    return result


@pytest.mark.parametrize("full", [False, True], ids=["stock", "full"])
def test_replica_equals_the_nodes_index(tiny_model: Path, tmp_path: Path, full: bool) -> None:
    config = EngineConfig(flexkv=True, full=full, environment=(("FLEXKV_CPU_CACHE_GB", "2MB"),))
    config = publishing(config, tmp_path / "sockets")
    steps = [
        generate("first", [prompt("first", LONG)]),
        *compare(config, tmp_path / "saved"),
        # vLLM's own connector is not told of resets, nor that vLLM says that all is cleared.
        *(emptied() if full else ()),
        generate("salted", [prompt("first", 3 * BLOCK)], salt="pepper"),
        # Six prompts of 20 blocks do not fit into 64.
        *(generate(f"many {i}", [ids]) for i, ids in enumerate(prompts())),
        *compare(config, tmp_path / "evicted"),
    ]
    if full:
        steps += [
            {"op": "reset"},
            *compare(config, tmp_path / "engine reset"),
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
    if full:
        assert told(tmp_path / "engine reset")["node"] == evicted["node"]
        assert told(tmp_path / "reset")["node"]["CPU"] == 0
        assert told(tmp_path / "again")["node"]["CPU"] == blocks


def test_a_daemon_and_its_engine_say_the_same(
    tiny_model: Path, tmp_path: Path, lora_adapters: dict[str, Path]
) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    own_replay = f"ipc://{tmp_path}/daemon-replay"
    argv = [*serve_argv(runtime), "--events", f"ipc://{tmp_path}/daemon-events", "--events-replay", own_replay]
    daemon = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=tmp_path)
    try:
        assert daemon.stdout is not None
        assert b"KV events at ipc://" in daemon.stdout.readline()
        environment = (("FLEXKV_RUNTIME_DIR", str(runtime)), ("FLEXKV_NODE", "shared"))
        config = EngineConfig(flexkv=True, full=True, lora=True, in_process=False, environment=environment)
        config = publishing(config, tmp_path / "sockets")
        steps = [
            *adapters(lora_adapters),
            *compare(config, tmp_path / "engine"),
            *compare(config, tmp_path / "daemon", own_replay),
            {"op": "run", "argv": [sys.executable, "-P", "-m", "flexkv.cli", "reset"]},
            *compare(config, tmp_path / "engine after"),
            *compare(config, tmp_path / "daemon after", own_replay),
        ]
        run_engine(config, tiny_model, steps, tmp_path / "files")
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(20)
    by_engine, by_daemon = told(tmp_path / "engine"), told(tmp_path / "daemon", on_gpu=False)
    assert by_engine["node"]["CPU"] == by_daemon["node"]["CPU"] > 20
    assert by_engine["loras"] == by_daemon["loras"] == ["A", "B", "None"]
    assert told(tmp_path / "engine after")["node"]["CPU"] == 0
    after = told(tmp_path / "daemon after", on_gpu=False)
    assert (after["node"]["CPU"], after["cleared"]) == (0, 2)


def test_blocks_of_an_earlier_run_are_told_when_a_request_finds_them(tiny_model: Path, tmp_path: Path) -> None:
    asked = [generate(f"prompt {i}", [ids]) for i, ids in enumerate(prompts())]
    config = EngineConfig(flexkv=True, full=True, environment=ssd(tmp_path / "ssd"))
    run_engine(config, tiny_model, [*asked, {"op": "settle", "seconds": 1}], tmp_path / "first")
    config = publishing(config, tmp_path / "sockets")
    steps = [*compare(config, tmp_path / "started"), *asked, *compare(config, tmp_path / "asked")]
    run_engine(config, tiny_model, steps, tmp_path / "second")
    started = json.loads((tmp_path / "started").read_text())
    assert started["node"]["DISK"] > 0
    assert started["replica"]["DISK"] == 0
    assert told(tmp_path / "asked")["node"]["DISK"] >= started["node"]["DISK"]
