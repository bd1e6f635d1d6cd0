"""A router that hears vLLM's KV events knows what FlexKV keeps: after saves, evictions, drives, resets and restarts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dynamo import free_port
from engine import BLOCK, EngineConfig, run_engine, run_program
from scenarios import LONG, adapters, emptied, generate, paced, prompt
from test_vllm_daemon import NAME, serve_argv
from test_vllm_ssd import prompts, ssd

_HERE = Path(__file__).parent


def publishing(config: EngineConfig, directory: Path) -> EngineConfig:
    directory.mkdir(exist_ok=True)
    return dataclasses.replace(config, kv_events=str(directory))


@contextlib.contextmanager
def daemon(directory: Path, *arguments: str) -> Iterator[tuple[tuple[str, str], ...]]:
    """A node of its own in a new directory; what engines need in their environment to use it."""
    runtime = directory / "run"
    runtime.mkdir(mode=0o700)
    process = subprocess.Popen([*serve_argv(runtime), *arguments], stdout=subprocess.PIPE, cwd=directory)
    try:
        assert process.stdout is not None
        assert (b"KV events at ipc://" if arguments else b"listens") in process.stdout.readline()
        yield ("FLEXKV_RUNTIME_DIR", str(runtime)), ("FLEXKV_NODE", NAME)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


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


def test_groups_tell_their_blocks_apart(hybrid_model: Path, tmp_path: Path) -> None:
    """Groups call a block of the same tokens by the same hash, and lose it one by one."""
    config = EngineConfig(flexkv=True, full=True, pool_blocks=110, environment=(("FLEXKV_CPU_CACHE_GB", "6MB"),))
    config = publishing(config, tmp_path / "sockets")
    steps = [
        *paced([generate("first", [prompt("first", LONG)])]),
        *compare(config, tmp_path / "saved"),
        *(generate(f"many {i}", [ids]) for i, ids in enumerate(prompts())),
        *compare(config, tmp_path / "evicted"),
        {"op": "reset", "connector": True},
        *compare(config, tmp_path / "reset"),
    ]
    run_engine(config, hybrid_model, steps, tmp_path / "engine")
    saved = told(tmp_path / "saved")
    assert saved["groups"] == ["0", "1", "2"]
    assert saved["node"]["CPU"] == 3 * ((LONG + 12 - 1) // BLOCK)
    evicted = told(tmp_path / "evicted")
    assert evicted["ever"]["CPU"] > evicted["node"]["CPU"] > 120
    assert told(tmp_path / "reset")["node"]["CPU"] == 0


def test_a_daemon_and_its_engine_say_the_same(
    tiny_model: Path, tmp_path: Path, lora_adapters: dict[str, Path]
) -> None:
    own_replay = f"ipc://{tmp_path}/daemon-replay"
    publisher = ["--events", f"ipc://{tmp_path}/daemon-events", "--events-replay", own_replay]
    with daemon(tmp_path, *publisher) as environment:
        config = EngineConfig(flexkv=True, full=True, lora=True, environment=environment)
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
    by_engine, by_daemon = told(tmp_path / "engine"), told(tmp_path / "daemon", on_gpu=False)
    assert by_engine["node"]["CPU"] == by_daemon["node"]["CPU"] > 20
    assert by_engine["loras"] == by_daemon["loras"] == ["A", "B", "None"]
    assert told(tmp_path / "engine after")["node"]["CPU"] == 0
    after = told(tmp_path / "daemon after", on_gpu=False)
    assert (after["node"]["CPU"], after["cleared"]) == (0, 2)


def of_two_ranks(directory: Path, nodes: list[str]) -> tuple[tuple[tuple[str, Any], ...], list[dict[str, Any]]]:
    """Arguments for an engine with two data-parallel ranks, and steps: the first answers one prompt, the second that and
    another one, then each is compared with its node."""
    endpoint, replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))  # vLLM adds the rank to the port
    publisher = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint, "replay_endpoint": replay}
    arguments = (("data_parallel_size", 2), ("kv_events_config", publisher))

    def asked(name: str, rank: int, ids: list[int]) -> dict[str, Any]:
        return {"op": "generate", "name": name, "rank": rank, "prompt": ids, "max_tokens": 12}

    def told_by(rank: int) -> list[dict[str, Any]]:
        port = int(replay.rpartition(":")[2]) + rank
        script = [sys.executable, "-P", str(_HERE / "kv_replica.py"), f"tcp://127.0.0.1:{port}"]
        argv = [*script, str(directory / str(rank)), nodes[rank]]
        return [asked(f"next step {rank}", rank, prompt("short", 5)), {"op": "run", "argv": argv}]

    settled = {"op": "settle", "seconds": 0.3}
    steps = [asked("first", 0, prompt("first", LONG)), settled, asked("first again", 1, prompt("first", LONG))]
    steps += [asked("other", 1, prompt("other", LONG)), settled, *told_by(0), *told_by(1)]
    return arguments, steps


_BLOCKS = (LONG + 12 - 1) // BLOCK


def test_data_parallel_ranks_at_a_daemon_tell_what_each_of_them_saved(tiny_model: Path, tmp_path: Path) -> None:
    arguments, steps = of_two_ranks(tmp_path, [NAME, NAME])
    with daemon(tmp_path) as environment:
        config = EngineConfig(flexkv=True, full=True, in_process=False, environment=environment, more=arguments)
        said = run_program("data_parallel_child.py", config, tiny_model, steps, tmp_path / "engine")
    assert said["first again"] == said["first"]
    for rank in range(2):
        # What the other rank has saved, this one's GPU events do not know.
        result = told(tmp_path / str(rank), on_gpu=False)
        assert result["ranks"] == [str(rank)]
        assert result["node"]["CPU"] == 2 * _BLOCKS


def test_data_parallel_ranks_have_nodes_of_their_own_otherwise(tiny_model: Path, tmp_path: Path) -> None:
    names = ["engine-" + hashlib.sha256(f"e2e_dp{rank}".encode()).hexdigest()[:24] for rank in range(2)]
    arguments, steps = of_two_ranks(tmp_path, names)
    config = EngineConfig(flexkv=True, full=True, in_process=False)
    transfer = config.llm_arguments(tiny_model)["kv_transfer_config"] | {"engine_id": "e2e"}
    config = dataclasses.replace(config, more=(*arguments, ("kv_transfer_config", transfer)))
    said = run_program("data_parallel_child.py", config, tiny_model, steps, tmp_path / "engine")
    assert said["first again"] == said["first"]
    for rank in range(2):
        result = told(tmp_path / str(rank))
        assert (result["ranks"], result["node"]["CPU"]) == ([str(rank)], (1 + rank) * _BLOCKS)


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
