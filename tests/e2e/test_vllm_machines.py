"""One vLLM whose ranks are on two machines (`--nnodes 2`), each with a daemon of its own: hits need the parts of both, and
outputs are those of an engine without FlexKV, whatever happens to the daemons."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RunBoth
from engine import EngineConfig, Results, run_engine
from scenarios import LONG, Step, emptied, generate, prompt, whole_blocks

_ENGINE_ARGUMENTS_ELSEWHERE = ("disable_log_stats",)  # of LLM only


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Machine:
    """A daemon in a directory of its own, as on a machine of its own."""

    def __init__(self, root: Path, name: str, secret: Path) -> None:
        self.name = name
        self.directory = root / name
        self.runtime = self.directory / "run"
        self.runtime.mkdir(parents=True)
        self.runtime.chmod(0o700)
        self.listens = f"127.0.0.1:{_free_port()}"
        self._secret = secret
        self.start()

    @property
    def argv(self) -> list[str]:
        variables = {
            "FLEXKV_RUNTIME_DIR": str(self.runtime),
            "FLEXKV_CPU_CACHE_GB": "64MB",
            "FLEXKV_CLUSTER_SECRET_FILE": str(self._secret),
            "FLEXKV_ENGINE_LISTEN": self.listens,
        }
        # Not marked as a part of the engine's run when a step starts it: it outlives that.
        unset = ["-u", "FLEXKV_NODE", "-u", "FLEXKV_ENGINE_HOSTS", "-u", "E2E_RUN_ID"]
        serve = [sys.executable, "-P", "-m", "flexkv.cli", "serve", "--name", self.name]
        return ["env", *unset, *(f"{key}={value}" for key, value in variables.items()), *serve]

    def start(self) -> None:
        self.process = subprocess.Popen(self.argv, stdout=subprocess.PIPE, cwd=self.directory, start_new_session=True)
        assert self.process.stdout is not None
        assert b"listens" in self.process.stdout.readline()

    @property
    def socket(self) -> str:
        return str(self.runtime / f"{self.name}.sock")

    def status(self) -> dict[str, Any]:
        from flexkv import _core

        return dict(json.loads(_core.query_status(self.socket)))

    def saved_blocks(self) -> int:
        return int(self.status()["transfers"]["to_host"]["blocks"])

    def close(self) -> None:
        pids = subprocess.run(["pgrep", "-f", f"serve --name {self.name}$"], capture_output=True, text=True, check=False)
        for pid in {self.process.pid, *(int(pid) for pid in pids.stdout.split())}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@dataclasses.dataclass
class Pair:
    """Two machines, and how an engine is spread over them."""

    root: Path
    first: Machine
    second: Machine

    def run(self, config: EngineConfig, model: Path, directory: Path, steps: list[Step]) -> Results:
        port = _free_port()
        spread = {"nnodes": 2, "master_addr": "127.0.0.1", "master_port": port, "distributed_executor_backend": "mp"}
        common = (("FLEXKV_CLUSTER_SECRET_FILE", str(self.root / "secret")),)
        # Ended by SIGKILL: in the end vLLM's first machine may wait for the others.
        here = dataclasses.replace(
            config,
            killed=True,
            more=(*spread.items(), ("node_rank", 0)),
            environment=(
                ("FLEXKV_RUNTIME_DIR", str(self.first.runtime)),
                ("FLEXKV_NODE", self.first.name),
                ("FLEXKV_ENGINE_HOSTS", self.second.listens),
                *common,
            ),
        )
        with self._elsewhere(dataclasses.replace(config, more=(*spread.items(), ("node_rank", 1))), model, directory):
            return run_engine(here, model, [*steps, {"op": "die"}], directory / "first")

    @contextlib.contextmanager
    def _elsewhere(self, config: EngineConfig, model: Path, directory: Path) -> Iterator[None]:
        directory.mkdir()
        arguments = config.llm_arguments(model)
        for name in _ENGINE_ARGUMENTS_ELSEWHERE:
            arguments.pop(name, None)
        spec = directory / "second.json"
        spec.write_text(json.dumps(arguments))
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("FLEXKV_", "VLLM_"))}
        cores = sorted(os.sched_getaffinity(0))
        environment = clean | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in (cores[-1], cores[0])),
            "FLEXKV_RUNTIME_DIR": str(self.second.runtime),
            "FLEXKV_NODE": self.second.name,
        }
        program = Path(__file__).with_name("machine_child.py")
        with (directory / "second.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", str(program), str(spec)],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=environment,
                start_new_session=True,
            )
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    root = tmp_path / "machines"
    root.mkdir()
    secret = root / "secret"
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_urlsafe(48))
    # Names of this run only: it ends daemons by them.
    with contextlib.ExitStack() as ends:
        machines = []
        for name in "ab":
            machines.append(Machine(root, f"machine-{name}-{os.getpid()}", secret))
            ends.callback(machines[-1].close)
        yield Pair(root, *machines)


_SERVED = """
import json, sys, time
from flexkv import _core
def ready(path):
    try:
        engines = json.loads(_core.query_status(path))["engines"]
    except RuntimeError:
        return False
    return len(engines) == 1 and engines[0]["state"] == "ready"
while not all(map(ready, sys.argv[1:])):
    time.sleep(0.05)
"""


def _once_served(pair: Pair) -> Step:
    return {"op": "run", "argv": [sys.executable, "-P", "-c", _SERVED, pair.first.socket, pair.second.socket]}


_TENSOR = EngineConfig(flexkv=True, full=True, in_process=False, tensor_parallel=2)
_PIPELINE = EngineConfig(flexkv=True, full=True, in_process=False, pipeline_parallel=2)


@pytest.mark.parametrize("config", [_TENSOR, _PIPELINE], ids=["tensor", "pipeline"])
def test_hits_come_from_both_machines(
    config: EngineConfig, pair: Pair, tiny_model: Path, tmp_path: Path, run_both: RunBoth
) -> None:
    long = prompt("machines", LONG)
    steps = [generate("cold", [long]), *emptied(), generate("warm", [long])]
    expected = run_both(config, steps).baseline
    got = pair.run(config, tiny_model, tmp_path / "engine", steps)
    assert {name: one.outputs for name, one in got.items()} == {name: one.outputs for name, one in expected.items()}
    assert [got[name].flexkv_hits for name in ("cold", "warm")] == [0, whole_blocks(LONG)]
    assert pair.first.saved_blocks() == pair.second.saved_blocks() > 0
    for machine in (pair.first, pair.second):
        assert machine.status()["transfers"]["to_device"]["blocks"] > 0


@pytest.mark.parametrize("killed", ["first", "second"])
def test_the_engine_goes_on_when_a_daemon_is_killed(killed: str, pair: Pair, tiny_model: Path, tmp_path: Path) -> None:
    machine = getattr(pair, killed)
    # A moment after the next step began: it comes while that loads, or a little before or after.
    kill = {"op": "run", "argv": ["sh", "-c", f"sleep 0.05; kill -KILL {machine.process.pid}"], "background": True}
    restart = {"op": "run", "argv": machine.argv, "background": True}
    prompts = [prompt(f"machines {i}", LONG) for i in range(3)]

    def each(name: str) -> list[Step]:
        return [step for i, one in enumerate(prompts) for step in (generate(f"{name} {i}", [one]), *emptied())]

    steps = [
        *(*each("cold"), *each("warm")),
        *(kill, *each("killed"), *each("without")),
        *(restart, _once_served(pair), *each("saved anew"), *each("again")),
    ]
    got = pair.run(_TENSOR, tiny_model, tmp_path / "engine", steps)
    hits = {name: [got[f"{name} {i}"].flexkv_hits for i in range(3)] for name in ("cold", "warm", "without", "again")}
    all_of_it = [whole_blocks(LONG)] * 3
    assert hits == {"cold": [0] * 3, "warm": all_of_it, "without": [0] * 3, "again": all_of_it}
    for name, one in got.items():
        assert one.outputs == got[f"cold {name[-1]}"].outputs, name
