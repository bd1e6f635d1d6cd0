"""Prompts that host memory cannot hold come from drives, also after the engine, the daemon, or both were killed while
writing: outputs are those of an engine without FlexKV."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import RunBoth
from engine import BLOCK, EngineConfig, Results, run_engine
from scenarios import ANSWER, LONG, emptied, generate, prompt, whole_blocks
from ssd_damage import damage_block
from test_vllm_daemon import wait_until

from flexkv import _core

_PROMPTS = 6
# A block of the tiny model takes 32 KiB on a host, so this holds 64 of them: three prompts (of 20), and not six. A prompt
# less would do, but what waits to be written is kept, and nothing waits for it.
_POOL = "2MB"
_KILLS = 3
_DAEMON_KILLS = 12


def ssd(directory: Path, policy: str = "always") -> tuple[tuple[str, str], ...]:
    directory.mkdir(exist_ok=True)
    return (
        ("FLEXKV_CPU_CACHE_GB", _POOL),
        ("FLEXKV_SSD_CACHE_GB", "64MB"),
        ("FLEXKV_SSD_CACHE_DIR", f"{directory}/a;{directory}/b"),
        ("FLEXKV_SSD_ADMISSION", "0"),
        # The tiny model computes as fast as a drive reads: with "auto", either may be chosen.
        ("FLEXKV_SSD_LOAD_POLICY", policy),
    )


def prompts() -> list[list[int]]:
    return [prompt(f"ssd {i}", LONG) for i in range(_PROMPTS)]


def one_by_one(round_name: str) -> list[dict[str, Any]]:
    """Each prompt alone, with the engine's own cache empty."""
    steps = []
    for i, ids in enumerate(prompts()):
        steps += [generate(f"{round_name} {i}", [ids]), *emptied()]
    return steps


def outputs(results: Results) -> dict[str, list[list[int]]]:
    return {name: result.outputs for name, result in results.items()}


def hits(results: Results, round_name: str) -> list[int]:
    return [results[f"{round_name} {i}"].flexkv_hits for i in range(_PROMPTS)]


@pytest.mark.parametrize(("in_process", "full"), [(True, False), (False, True)], ids=["in_process", "multi_process-full"])
def test_drives_hold_what_host_memory_cannot_also_after_a_restart(
    tiny_model: Path, tmp_path: Path, run_both: RunBoth, in_process: bool, full: bool
) -> None:
    steps = [*one_by_one("cold"), *one_by_one("warm")]
    expected = outputs(run_both(EngineConfig(flexkv=True, in_process=True), steps).baseline)
    config = EngineConfig(flexkv=True, in_process=in_process, full=full, environment=ssd(tmp_path / "ssd"))
    first = run_engine(config, tiny_model, steps, tmp_path / "first")
    assert outputs(first) == expected
    assert hits(first, "cold") == [0] * _PROMPTS
    assert hits(first, "warm") == [whole_blocks(LONG)] * _PROMPTS
    said = tmp_path / "status"
    again = run_engine(config, tiny_model, [*steps, {"op": "status", "path": str(said)}], tmp_path / "again")
    assert outputs(again) == expected
    assert hits(again, "cold") == [whole_blocks(LONG)] * _PROMPTS
    # Only the full connector hears of a request before its turn.
    assert (json.loads(said.read_text())["disk"]["prefetched_blocks"] > 0) == full


@pytest.mark.parametrize(
    ("in_process", "full", "async_scheduling", "tensor_parallel"),
    [(True, False, False, 1), (True, True, False, 1), (False, True, True, 1), (False, False, False, 2)],
    ids=["own", "full", "full-async", "own-tp2"],
)
def test_what_lies_before_a_damaged_block_is_a_hit(
    tiny_model: Path,
    tmp_path: Path,
    run_both: RunBoth,
    in_process: bool,
    full: bool,
    async_scheduling: bool,
    tensor_parallel: int,
) -> None:
    ids, good, blocks = prompt("damaged", LONG), 11, LONG // BLOCK
    steps = [generate("first", [ids]), *emptied(), generate("again", [ids])]
    expected = outputs(run_both(EngineConfig(flexkv=True, in_process=True), steps).baseline)
    config = EngineConfig(
        flexkv=True,
        in_process=in_process,
        full=full,
        async_scheduling=async_scheduling,
        tensor_parallel=tensor_parallel,
        environment=(*ssd(tmp_path / "ssd"), ("FLEXKV_SSD_CACHE_DIR", f"{tmp_path}/ssd")),
    )
    assert outputs(run_engine(config, tiny_model, steps, tmp_path / "before")) == expected
    damage_block(tmp_path / "ssd", good)
    after = run_engine(config, tiny_model, steps, tmp_path / "after")
    assert outputs(after) == expected
    log = (tmp_path / "after" / "engine.log").read_text()
    if full and "rescheduled" not in log:
        # The prefetch met the damaged block before the lookup, which ended there then.
        assert after["first"].flexkv_hits == good * BLOCK
    else:
        # vLLM counts what it takes back: all from the damaged block on, and nothing before it.
        assert f"1 request(s) rescheduled ({(blocks - good) * BLOCK} tokens affected)" in log
        assert f"{blocks - good} of {blocks} blocks of request" in log
    # What was computed instead has been kept.
    assert after["again"].flexkv_hits == whole_blocks(LONG)
    healed = run_engine(config, tiny_model, steps[:1], tmp_path / "healed")
    assert healed["first"].flexkv_hits == whole_blocks(LONG)
    assert "could not be loaded" not in (tmp_path / "healed" / "engine.log").read_text()


def written(status: dict[str, Any]) -> int:
    return sum(drive["blocks_written"] for drive in status["disk"]["drives"])


def writing(status: dict[str, Any]) -> bool:
    """Whether there are blocks to be written, and drives at work."""
    return status["queues"]["disk_writes"] > 0 and any(drive["queued"] for drive in status["disk"]["drives"])


def status_of(runtime: Path) -> dict[str, Any]:
    return json.loads(_core.query_status(str(runtime / "default.sock")))


def small_ssd(directory: Path) -> tuple[tuple[str, str], ...]:
    """Holds fewer blocks than the prompts have: there is always something to write."""
    return (*ssd(directory), ("FLEXKV_SSD_CACHE_GB", "3MB"))


def churn(until: Path) -> dict[str, Any]:
    return {"op": "churn", "name": "churn", "prompts": prompts(), "max_tokens": ANSWER, "until": str(until)}


def computed_alone(run_both: RunBoth) -> list[list[int]]:
    results = run_both(EngineConfig(flexkv=True), one_by_one("cold")).baseline
    return [answer for result in results.values() for answer in result.outputs]


def test_engine_killed_while_it_writes(tiny_model: Path, tmp_path: Path, run_both: RunBoth) -> None:
    steps = one_by_one("cold")
    expected = outputs(run_both(EngineConfig(flexkv=True), steps).baseline)
    environment = small_ssd(tmp_path / "ssd")
    recovered = []
    for kill in range(_KILLS):
        # Without a moment of rest, and at another place each time.
        before = [step for step in steps[: 3 * kill] if step["op"] != "settle"]
        said = tmp_path / f"status {kill}"
        end = {"op": "die_in_writes", "path": str(said), "written": 8 * (kill + 1)}
        dying = [*before, end, churn(tmp_path / "never")]
        config = EngineConfig(flexkv=True, killed=True, in_process=kill % 2 == 0, environment=environment)
        died = run_engine(config, tiny_model, dying, tmp_path / f"dying {kill}")
        assert outputs(died) == {name: expected[name] for name in died}
        status = json.loads(said.read_text())
        assert writing(status)
        recovered.append(status["disk"]["recovered_blocks"])
    # Not after each kill: of the few blocks written by then, none may begin a prompt, and the others are of no use.
    assert any(recovered[1:])
    after = run_engine(EngineConfig(flexkv=True, environment=environment), tiny_model, steps, tmp_path / "after")
    assert outputs(after) == expected
    assert sum(hits(after, "cold")) > 0


@contextlib.contextmanager
def daemon_over_drives(runtime: Path, environment: tuple[tuple[str, str], ...]) -> Iterator[subprocess.Popen[bytes]]:
    variables = {"FLEXKV_RUNTIME_DIR": str(runtime)} | dict(environment)
    argv = ["env", *(f"{name}={value}" for name, value in variables.items()), sys.executable, "-m", "flexkv.cli", "serve"]
    daemon = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=runtime.parent)
    try:
        assert daemon.stdout is not None
        assert b"listens" in daemon.stdout.readline()
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()


def test_daemon_and_engine_killed_while_they_write(tiny_model: Path, tmp_path: Path, run_both: RunBoth) -> None:
    steps = one_by_one("cold")
    expected = outputs(run_both(EngineConfig(flexkv=True), steps).baseline)
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    drives = small_ssd(tmp_path / "ssd")
    environment = (("FLEXKV_RUNTIME_DIR", str(runtime)), ("FLEXKV_NODE", "default"))
    recovered = []
    for kill in range(_KILLS):
        said = tmp_path / f"status {kill}"
        with daemon_over_drives(runtime, drives) as daemon:
            node = {"socket": str(runtime / "default.sock"), "also": [daemon.pid]}
            end = {"op": "die_in_writes", "path": str(said), "written": 8 * (kill + 1)} | node
            dying = [*(step for step in steps[: 3 * kill] if step["op"] != "settle"), end, churn(tmp_path / "never")]
            config = EngineConfig(flexkv=True, killed=True, in_process=kill % 2 == 0, environment=environment)
            died = run_engine(config, tiny_model, dying, tmp_path / f"engine {kill}")
        assert outputs(died) == {name: expected[name] for name in died}
        status = json.loads(said.read_text())
        assert writing(status)
        recovered.append(status["disk"]["recovered_blocks"])
    assert any(recovered[1:])
    with daemon_over_drives(runtime, drives):
        after = run_engine(EngineConfig(flexkv=True, environment=environment), tiny_model, steps, tmp_path / "after")
    assert outputs(after) == expected
    assert sum(hits(after, "cold")) > 0


def test_daemon_killed_again_and_again_while_it_writes(tiny_model: Path, tmp_path: Path, run_both: RunBoth) -> None:
    expected = computed_alone(run_both)
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    drives = small_ssd(tmp_path / "ssd")
    environment = (("FLEXKV_RUNTIME_DIR", str(runtime)), ("FLEXKV_NODE", "default"))
    config = EngineConfig(flexkv=True, full=True, in_process=False, environment=environment)
    enough = tmp_path / "enough"
    recovered = []
    with ThreadPoolExecutor() as pool:
        engine = pool.submit(run_engine, config, tiny_model, [churn(enough)], tmp_path / "engine")
        try:
            for kill in range(_DAEMON_KILLS):
                with daemon_over_drives(runtime, drives) as daemon:
                    # Not always among the first ones; and nothing comes between the look and the kill.
                    while not writing(status := status_of(runtime)) or written(status) < 4 * (kill + 1):
                        assert not engine.done(), engine.result()
                    daemon.kill()
                recovered.append(status["disk"]["recovered_blocks"])
        finally:
            enough.touch()
        # Not after each kill: of the few blocks written by then, none may begin a prompt, and the others are of no use.
        assert sum(blocks > 0 for blocks in recovered[1:]) > _DAEMON_KILLS // 2
        assert engine.result()["churn"].outputs == expected


def test_status_tells_what_was_found(tiny_model: Path, tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    variables = {"FLEXKV_RUNTIME_DIR": str(runtime)} | dict(ssd(tmp_path / "ssd"))
    argv = ["env", *(f"{name}={value}" for name, value in variables.items()), sys.executable, "-m", "flexkv.cli", "serve"]
    environment = (("FLEXKV_RUNTIME_DIR", str(runtime)), ("FLEXKV_NODE", "default"))

    written = 0
    for round_number in range(2):
        daemon = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=tmp_path)
        try:
            assert daemon.stdout is not None
            assert b"listens" in daemon.stdout.readline()
            config = EngineConfig(flexkv=True, environment=environment)
            run_engine(config, tiny_model, one_by_one("cold"), tmp_path / f"engine {round_number}")
            wait_until(lambda: status_of(runtime)["queues"]["disk_writes"] == 0)
            disk = status_of(runtime)["disk"]
            assert [drive["reads"] and drive["writes"] for drive in disk["drives"]] == [True, True]
            assert disk["recovered_blocks"] == written
            written += sum(drive["blocks_written"] for drive in disk["drives"])
            assert 0 < written <= _PROMPTS * (LONG // 32)
            assert status_of(runtime)["health"]["state"] == "ok"
        finally:
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(20) == 0


def test_auto_loads_what_it_says_it_chose(tiny_model: Path, tmp_path: Path, run_both: RunBoth) -> None:
    steps = [*one_by_one("cold"), *one_by_one("warm")]
    expected = outputs(run_both(EngineConfig(flexkv=True, in_process=True), steps).baseline)
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    variables = {"FLEXKV_RUNTIME_DIR": str(runtime)} | dict(ssd(tmp_path / "ssd", "auto"))
    argv = ["env", *(f"{name}={value}" for name, value in variables.items()), sys.executable, "-m", "flexkv.cli", "serve"]
    daemon = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=tmp_path)
    try:
        assert daemon.stdout is not None
        assert b"listens" in daemon.stdout.readline()
        environment = (("FLEXKV_RUNTIME_DIR", str(runtime)), ("FLEXKV_NODE", "default"))
        results = run_engine(EngineConfig(flexkv=True, environment=environment), tiny_model, steps, tmp_path / "engine")
        status = status_of(runtime)
    finally:
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
    assert outputs(results) == expected
    choices = status["disk"]["choices"]
    latest = choices["latest"]
    assert choices["policy"] == "auto"
    assert choices["all"] + choices["part"] + choices["none"] == len(latest) > 0
    found = [sum(one[f"{where}_blocks"] for where in ("engine", "host", "coming", "drive")) for one in latest]
    chosen = [one["chosen_blocks"] for one in latest]
    assert choices["recomputed_blocks"] == sum(found) - sum(chosen)
    assert latest[0]["basis"] == "reads_unknown"
    for one, blocks in zip(latest, found, strict=True):
        assert one["drive_blocks"] + one["coming_blocks"] > 0
        assert one["chosen_blocks"] == blocks or one["basis"] == "cost"
        if one["basis"] == "cost":
            assert one["read_bytes_per_s"] > 0
            assert 0 < one["expected_us"] <= max(one["expected_if_all_us"], one["expected_if_none_us"])
            assert one["expected_if_none_us"] > one["engine_wait_us"]
    # Where nothing had to be chosen, host memory had it all.
    whole = whole_blocks(LONG)
    told = [min(count * BLOCK, whole) for count in chosen] + [whole] * (_PROMPTS - len(latest))
    assert sorted(hits(results, "warm")) == sorted(told)
