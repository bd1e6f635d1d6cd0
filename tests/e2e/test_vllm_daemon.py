"""Engines that share a daemon, and what is left when one side is killed: no request fails, no wrong token, hits return."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RunBoth
from engine import EngineConfig, Results, open_descriptors, run_engine
from scenarios import LONG, SHARED, emptied, generate, prompt, whole_blocks

# Of this run only: tests that run beside it must not end each other's daemons by their names.
NAME = f"shared-{os.getpid()}"
_ASYNC_LOADS = ("FLEXKV_SYNC_LOAD_MAX_MB", "0")


@dataclasses.dataclass
class Daemon:
    runtime: Path
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> tuple[tuple[str, str], ...]:
        return (("FLEXKV_RUNTIME_DIR", str(self.runtime)), ("FLEXKV_NODE", NAME))

    def status(self) -> dict[str, Any]:
        from flexkv import _core

        return json.loads(_core.query_status(str(self.runtime / f"{NAME}.sock")))

    def start_argv(self) -> list[str]:
        return serve_argv(self.runtime)


def serve_argv(runtime: Path) -> list[str]:
    variables = [f"FLEXKV_RUNTIME_DIR={runtime}", "FLEXKV_CPU_CACHE_GB=128MB"]
    # Not marked as a part of the engine's run when one starts it: it is to outlive that.
    return [
        "env",
        "-u",
        "FLEXKV_NODE",
        "-u",
        "E2E_RUN_ID",
        *variables,
        sys.executable,
        "-m",
        "flexkv.cli",
        "serve",
        "--name",
        NAME,
    ]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    process = subprocess.Popen(serve_argv(runtime), stdout=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout is not None
    assert b"listens" in process.stdout.readline()
    try:
        yield Daemon(runtime, process)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        subprocess.run(["pkill", "-KILL", "-f", f"flexkv.cli serve --name {NAME}"], check=False)
        process.wait()


def engine(daemon: Daemon, model: Path, directory: Path, steps: list[dict[str, Any]], **more: Any) -> Results:
    environment = daemon.environment + tuple(more.pop("environment", ()))
    return run_engine(EngineConfig(flexkv=True, environment=environment, **more), model, steps, directory)


def cold_steps() -> list[dict[str, Any]]:
    long = prompt("daemon", LONG)
    return [generate("first", [long]), {"op": "settle", "seconds": 0.3}]


def test_second_engine_hits_what_the_first_stored(
    daemon: Daemon, tiny_model: Path, tmp_path: Path, run_both: RunBoth
) -> None:
    expected = run_both(EngineConfig(flexkv=True), cold_steps()).baseline["first"].outputs
    first = engine(daemon, tiny_model, tmp_path / "a", cold_steps())
    assert first["first"].flexkv_hits == 0
    descriptors = open_descriptors([daemon.process.pid])
    for name in ("b", "c"):
        again = engine(daemon, tiny_model, tmp_path / name, cold_steps())
        assert again["first"].flexkv_hits == whole_blocks(LONG)
        assert again["first"].outputs == first["first"].outputs == expected
    wait_until(lambda: daemon.status()["queues"]["peers"] == 0)
    wait_until(lambda: open_descriptors([daemon.process.pid]) <= descriptors)
    assert daemon.status()["engines"] == []


@pytest.mark.parametrize("in_process", [True, False], ids=["in_process", "multi_process"])
def test_engine_killed_and_started_again(
    daemon: Daemon, tiny_model: Path, tmp_path: Path, run_both: RunBoth, in_process: bool
) -> None:
    expected = run_both(EngineConfig(flexkv=True), cold_steps()).baseline["first"].outputs
    dying = [*cold_steps(), {"op": "die"}]
    engine(daemon, tiny_model, tmp_path / "a", dying, killed=True, in_process=in_process)
    wait_until(lambda: daemon.status()["queues"]["peers"] == 0)
    status = daemon.status()
    assert status["engines"] == []
    assert status["queues"]["jobs_in_flight"] == 0
    again = engine(daemon, tiny_model, tmp_path / "b", cold_steps())
    assert again["first"].flexkv_hits == whole_blocks(LONG)
    assert again["first"].outputs == expected


@pytest.mark.parametrize("load", ["sync", "async"])
def test_daemon_killed_while_serving(
    daemon: Daemon, tiny_model: Path, tmp_path: Path, run_both: RunBoth, load: str
) -> None:
    long = prompt("daemon", LONG)
    many = [prompt(f"beside {i}", SHARED) for i in range(6)]
    kill = {"op": "run", "argv": ["pkill", "-KILL", "-f", f"flexkv.cli serve --name {NAME}"]}
    # The kill comes while the engine serves: in the background, a moment after the next step began.
    kill_soon = {"op": "run", "argv": ["sh", "-c", f"sleep 0.15; {' '.join(kill['argv'][:3])} '{kill['argv'][3]}'"]}

    def steps(**background: Any) -> list[dict[str, Any]]:
        return [
            generate("first", [long]),
            *emptied(),
            kill_soon | background,
            generate("while dying", [long, *many], max_tokens=40),
            *emptied(),
            generate("without", [long]),
            {"op": "run", "argv": daemon.start_argv(), "background": True},
            {"op": "run", "argv": ["sh", "-c", f"until [ -S {daemon.runtime}/{NAME}.sock ]; do sleep 0.1; done"]},
            {"op": "settle", "seconds": 2},
            *emptied(),
            generate("back", [long]),
            # A lookup that finds the machine busy gives up, and asks again only after a second.
            *(
                step
                for attempt in range(3)
                for step in (*emptied(), {"op": "settle", "seconds": 1.2}, generate(f"again {attempt}", [long]))
            ),
        ]

    plain = [step for step in steps() if step["op"] != "run"]
    expected = run_both(EngineConfig(flexkv=True), plain).baseline
    environment = (_ASYNC_LOADS,) if load == "async" else ()
    got = engine(daemon, tiny_model, tmp_path / "a", steps(background=True), environment=environment)
    assert {name: result.outputs for name, result in got.items()} == {
        name: result.outputs for name, result in expected.items()
    }
    assert got["without"].flexkv_hits == 0
    assert whole_blocks(LONG) in {got[f"again {attempt}"].flexkv_hits for attempt in range(3)}


@pytest.mark.parametrize("full", [False, True], ids=["stock", "full"])
@pytest.mark.parametrize("load", ["sync", "async"])
def test_injected_load_failures_are_recomputed(
    tiny_model: Path, tmp_path: Path, run_both: RunBoth, load: str, full: bool
) -> None:
    long = prompt("failing", LONG)
    other = long[:SHARED] + prompt("other end", 90)
    plain = [
        generate("first", [long]),
        *emptied(),
        generate("failing", [long, other]),
        *emptied(),
        generate("after", [long, other]),
        *emptied(),
        generate("healed", [long, other]),
    ]
    expected = run_both(EngineConfig(flexkv=True), plain).baseline
    steps = [*plain[:3], {"op": "fail_loads", "on": True}, plain[3], {"op": "fail_loads", "on": False}, *plain[4:]]
    environment = (_ASYNC_LOADS,) if load == "async" else ()
    got = run_engine(
        EngineConfig(flexkv=True, full=full, environment=environment), tiny_model, steps, tmp_path / "engine"
    )
    assert {name: result.outputs for name, result in got.items()} == {
        name: result.outputs for name, result in expected.items()
    }
    assert got["healed"].flexkv_hits > 0


def test_a_load_that_fails_under_asynchronous_scheduling_does_not_end_the_engine(
    tiny_model: Path, tmp_path: Path, run_both: RunBoth
) -> None:
    long = prompt("failing", LONG)
    plain = [generate("first", [long]), *emptied(), generate("failing", [long]), *emptied(), generate("healed", [long])]
    config = EngineConfig(flexkv=True, async_scheduling=True)
    expected = run_both(config, plain).baseline
    steps = [*plain[:3], {"op": "fail_loads", "on": True}, plain[3], {"op": "fail_loads", "on": False}, *plain[4:]]
    got = run_engine(config, tiny_model, steps, tmp_path / "engine")
    assert {name: result.outputs for name, result in got.items()} == {
        name: result.outputs for name, result in expected.items()
    }
    assert got["healed"].flexkv_hits > 0


def wait_until(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
