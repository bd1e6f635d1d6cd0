"""Runs a scenario in a fresh, real vLLM and checks what it leaves behind.

Each run is a process group with its own FLEXKV_RUNTIME_DIR; when `run_engine` returns or raises, the group is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nursery import MARK, Child, Nursery

BLOCK = 32
# Room for one prompt of the longest kind and little else: a storm of requests has to preempt.
POOL_BLOCKS = 36
MAX_TOKENS = 1024
# vLLM's tensor-parallel CPU workers leave theirs behind, with or without a connector.
_VLLM_LEAK = ("vllm_dist_",)
# Python's own names for what processes share through `multiprocessing`, as vLLM's do: nobody clears it up after SIGKILL.
_LEFT_BY_SIGKILL = ("psm_", "sem.mp-")
_LOG_TAIL = 6000
# Processes of a good run may need a moment to notice that their parent is gone; on a busy machine a long one.
_EXIT_GRACE_SECONDS = 60.0
_latest_nursery: Nursery | None = None


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How vLLM is started. `flexkv`: with a connector, the one that ships in vLLM unless `full`. `killed`: a step ends the
    engine with SIGKILL, which is then how it should end. `kv_events`: publishes them, on sockets in that directory.
    `failure_policy`: what vLLM does about loads that fail. `more`: further arguments of LLM()."""

    flexkv: bool
    in_process: bool = True
    tensor_parallel: int = 1
    async_scheduling: bool = False
    lora: bool = False
    full: bool = False
    killed: bool = False
    pool_blocks: int = POOL_BLOCKS
    kv_events: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    pipeline_parallel: int = 1
    failure_policy: str = "recompute"
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        executor = "in_process" if self.in_process else "multi_process"
        parts = [executor] + [f"tp{self.tensor_parallel}"] * (self.tensor_parallel > 1)
        parts += [f"pp{self.pipeline_parallel}"] * (self.pipeline_parallel > 1)
        parts += ["async_scheduling"] * self.async_scheduling + ["lora"] * self.lora + ["full"] * self.full
        parts += [value for _, value in self.environment if value.isalnum()]
        return "-".join([*parts, "flexkv" if self.flexkv else "baseline"])

    @property
    def replay_endpoint(self) -> str:
        return f"ipc://{self.kv_events}/replay"

    def llm_arguments(self, model: Path) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": str(model),
            "dtype": "float32",
            "seed": 0,
            "max_model_len": MAX_TOKENS,
            "max_num_seqs": 16,
            # Long prompts take several steps, so that saves and loads meet half-computed prompts.
            "max_num_batched_tokens": 512,
            "block_size": BLOCK,
            "num_gpu_blocks_override": self.pool_blocks,
            "kv_cache_memory_bytes": 256 << 20,
            "tensor_parallel_size": self.tensor_parallel,
            "pipeline_parallel_size": self.pipeline_parallel,
            "enforce_eager": True,
            "disable_log_stats": False,
        }
        if self.lora:
            arguments |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
        if self.flexkv:
            arguments["kv_transfer_config"] = {
                "kv_connector": "FlexKVConnectorV1",
                "kv_role": "kv_both",
                "kv_load_failure_policy": self.failure_policy,
            }
        if self.kv_events:
            arguments["kv_events_config"] = {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": f"ipc://{self.kv_events}/events",
                "replay_endpoint": self.replay_endpoint,
            }
        if self.flexkv and self.full:
            arguments["kv_transfer_config"] |= {
                "kv_connector": "FlexKVConnector",
                "kv_connector_module_path": "flexkv.integration.vllm.connector",
            }
        return arguments | dict(self.more)


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step showed. Token counts are of all its prompts together, from vLLM's counters.

    `computed` + `engine_hits` + `flexkv_hits` = prompt tokens. `descriptors`: open ones of the engine's processes.
    `drafted`, `accepted`: tokens of speculative decoding. `vectors`: of a pooling model. `errors`: requests that failed.
    """

    outputs: list[list[int]]
    computed: int
    engine_hits: int
    flexkv_hits: int
    preemptions: int
    drafted: int
    accepted: int
    descriptors: int
    prompt_logprobs: list[list[float]]
    vectors: list[list[float]]
    errors: int
    reset: bool | None


Results = dict[str, StepResult]


class EngineFailure(AssertionError):
    """A run that crashed, hung or left something behind; the message ends with the engine's log."""


def run_engine(
    config: EngineConfig,
    model: Path,
    steps: list[dict[str, Any]],
    directory: Path,
    timeout: float = 300,
    python: str = sys.executable,
) -> Results:
    """Carries out `steps` in a new vLLM, that of `python`. Files go to `directory`. Raises EngineFailure."""
    results = run_program("engine_child.py", config, model, steps, directory, timeout, python)
    return {name: StepResult(**fields) for name, fields in results.items()}


def run_program(
    program: str,
    config: EngineConfig,
    model: Path,
    steps: list[dict[str, Any]],
    directory: Path,
    timeout: float = 300,
    python: str = sys.executable,
) -> dict[str, Any]:
    """The same by a program beside this file, which is given a file with `arguments`, `steps` and where to put `results`."""
    directory.mkdir(parents=True)
    runtime, log, results = directory / "run", directory / "engine.log", directory / "results.json"
    runtime.mkdir(mode=0o700)
    spec = directory / "spec.json"
    spec.write_text(
        json.dumps(
            {
                "arguments": config.llm_arguments(model),
                "async_scheduling": config.async_scheduling,
                "steps": steps,
                "results": str(results),
            }
        )
    )
    mark = uuid.uuid4().hex
    shared_memory = set(os.listdir("/dev/shm"))
    process = _start(Path(__file__).with_name(program), spec, _environment(config, runtime, mark), log, python)
    with _ended(process, mark):
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise EngineFailure(f"{config.name}: no end after {timeout} s\n{_stacks(mark)}\n{_tail(log)}") from None
        if code != (-signal.SIGKILL if config.killed else 0):
            raise EngineFailure(f"{config.name}: exit code {code}\n{_tail(log)}")
        left = leftovers(mark, runtime, shared_memory, config.killed)
    if left:
        raise EngineFailure(f"{config.name} left behind: {left}\n{_tail(log)}")
    return dict(json.loads(results.read_text()))


def _start(
    program: Path, spec: Path, environment: dict[str, str], log: Path, python: str
) -> subprocess.Popen[bytes] | Child:
    if python == sys.executable:
        return _nursery().start(program, str(spec), environment, spec.parent, log)
    with log.open("wb") as log_file:
        return subprocess.Popen(
            [python, "-P", str(program), str(spec)],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            cwd=spec.parent,
            env=environment,
            start_new_session=True,
        )


def _nursery() -> Nursery:
    global _latest_nursery
    if _latest_nursery is None or not _latest_nursery.alive:
        _latest_nursery = Nursery(_common_environment())
    return _latest_nursery


def leftovers(mark: str, runtime: Path, shared_memory_before: set[str], killed: bool) -> list[str]:
    """What a finished run may not leave: processes, files in its runtime directory, shared memory."""
    forgiven = _VLLM_LEAK + (_LEFT_BY_SIGKILL if killed else ())
    deadline = time.monotonic() + _EXIT_GRACE_SECONDS
    while found := _leftovers_now(mark, runtime, shared_memory_before, forgiven, killed):
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    return found


def _leftovers_now(
    mark: str, runtime: Path, shared_memory_before: set[str], forgiven: tuple[str, ...], forgives_node: bool
) -> list[str]:
    found = [f"process {pid}: {_command(pid)}" for pid in marked_processes(mark)]
    # Socket and lock of a node that was killed stay until the next node of that directory starts.
    of_a_node = (".sock", ".lock") if forgives_node else ()
    found += [f"file {path}" for path in runtime.rglob("*") if path.suffix not in of_a_node]
    for name in sorted(set(os.listdir("/dev/shm")) - shared_memory_before):
        path = Path("/dev/shm") / name
        # Others on this machine may have made some meanwhile; theirs is in use by a process, a leaked one is not.
        if _in_use(path):
            continue
        if name.startswith(forgiven):
            path.unlink(missing_ok=True)
        else:
            found.append(f"shared memory {name}")
    return found


def marked_processes(mark: str) -> list[int]:
    """Live processes whose environment carries the run's mark: its children however deep, orphans too."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def open_descriptors(pids: list[int]) -> int:
    """Open descriptors of all these processes together."""
    count = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            count += len(os.listdir(f"/proc/{pid}/fd"))
    return count


def _common_environment() -> dict[str, str]:
    # The settings of whoever runs the tests must not leak into them.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FLEXKV_", "VLLM_"))}
    return clean | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        # Steps that reach into workers send them functions.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "OMP_NUM_THREADS": "1",
        # vLLM gives its further processes a thread for each core; they must not spin there while others want to compute.
        "OMP_WAIT_POLICY": "passive",
        # A hung engine that gets SIGABRT writes the stacks of its Python threads into the log.
        "PYTHONFAULTHANDLER": "1",
    }


def _environment(config: EngineConfig, runtime: Path, mark: str) -> dict[str, str]:
    environment = _common_environment() | {
        MARK: mark,
        "FLEXKV_RUNTIME_DIR": str(runtime),
        "FLEXKV_CPU_CACHE_GB": "256MB",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if config.in_process else "1",
    }
    ranks = config.tensor_parallel * config.pipeline_parallel
    if ranks > 1:
        cores = sorted(os.sched_getaffinity(0))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    return environment | dict(config.environment)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes] | Child, mark: str) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in marked_processes(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _stacks(mark: str) -> str:
    """Makes the run's processes write their Python stacks into the log; says which there were."""
    pids = marked_processes(mark)
    commands = "\n".join(f"  {pid}: {_command(pid)}" for pid in pids)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
    time.sleep(1)
    return f"processes:\n{commands}"


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "gone"


def _in_use(path: Path) -> bool:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not entry.name.isdigit():
                continue
            if str(path) in (entry / "maps").read_text():
                return True
            if any(os.readlink(fd) == str(path) for fd in (entry / "fd").iterdir()):
                return True
    return not path.exists()


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace")
    return f"... {log}\n{text[-_LOG_TAIL:]}"
