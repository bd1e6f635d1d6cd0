"""A real NVIDIA Dynamo on this machine: `flexkv serve`, the frontend with its KV router, and vLLM workers on CPUs that share
the node. Workers are found through files, events go through ZeroMQ, unless etcd and NATS are started beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from engine import BLOCK, MAX_TOKENS, POOL_BLOCKS, marked_processes
from nursery import MARK

# Dynamo needs another vLLM than the other tests: scripts/setup --tests lays one over the environment.
PYTHON = os.environ.get("DYNAMO_PYTHON") or str(Path(sys.prefix) / "dynamo/bin/python")
# Debian keeps servers where users need not have them on their path.
SERVERS = {name: shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") for name in ("etcd", "nats-server")}
MODEL = "tiny"
_NODE = "default"
_HANG_SECONDS = 600.0
# What it leaves in a worker's log when it is asked whether it is ready.
_ASKED_IN_VAIN = "tower_http::trace::on_failure"
_OWN_HITS = "vllm:prefix_cache_hits_total"
_FLEXKV_HITS = "vllm:external_prefix_cache_hits_total"
_FLEXKV_ROLE = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
FLEXKV = {"kv_connector": "FlexKVConnectorV1"} | _FLEXKV_ROLE
FLEXKV_FULL = {
    "kv_connector": "FlexKVConnector",
    "kv_connector_module_path": "flexkv.integration.vllm.connector",
} | _FLEXKV_ROLE


@dataclasses.dataclass(frozen=True)
class Answer:
    """Of one request. `cached`: prompt tokens that were not computed. `foreseen`: the share of the prompt that the router
    expected `worker` to have."""

    worker: int
    tokens: list[int]
    cached: int
    foreseen: float


@dataclasses.dataclass(frozen=True)
class Hits:
    """Prompt tokens that one worker found in its own prefix cache and in FlexKV since its start."""

    own: int
    flexkv: int

    def __sub__(self, before: Hits) -> Hits:
        return Hits(self.own - before.own, self.flexkv - before.flexkv)


class Refused(Exception):
    """A request was not answered with 200."""


class Worker:
    def __init__(self, name: str, process: subprocess.Popen[bytes], port: int) -> None:
        self.name = name
        self.process = process
        self._port = port

    @property
    def ready(self) -> bool:
        with contextlib.suppress(OSError, Refused):
            return bool(_get(f"http://127.0.0.1:{self._port}/health")["status"] == "ready")
        return False

    @property
    def id(self) -> int:
        """Dynamo's number for it."""
        found = re.search(r'worker_id="([0-9a-f]+)"', self._metrics())
        assert found
        return int(found[1], 16)

    @property
    def hits(self) -> Hits:
        text = self._metrics()
        return Hits(*(int(_counter(text, name)) for name in (_OWN_HITS, _FLEXKV_HITS)))

    def kill(self) -> None:
        """All its processes, with SIGKILL."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=60) as answer:
            return str(answer.read().decode())


class Deployment:
    """A context manager: when it ends, so have all its processes. Logs are in `directory`."""

    def __init__(self, directory: Path, environment: dict[str, str] | None = None) -> None:
        self._directory = directory
        self._mark = uuid.uuid4().hex
        self._runtime = directory / "run"
        self._runtime.mkdir(mode=0o700)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._port = free_port()
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("FLEXKV_", "VLLM_", "DYN_"))}
        self._environment = clean | {
            MARK: self._mark,
            "FLEXKV_RUNTIME_DIR": str(self._runtime),
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": str(directory / "discovery"),
            "DYN_EVENT_PLANE": "zmq",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            # With SIGABRT they write the stacks of their Python threads into their logs.
            "PYTHONFAULTHANDLER": "1",
            **(environment or {}),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        for pid in marked_processes(self._mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._processes.values():
            process.wait()

    def start_etcd_and_nats(self) -> None:
        """Before all others: they find each other through etcd then, and events and requests go through NATS. Needs SERVERS."""
        clients, peers = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        data = ["--data-dir", str(self._directory / "etcd")]
        urls = ["--listen-client-urls", clients, "--advertise-client-urls", clients, "--listen-peer-urls", peers]
        self._spawn("etcd", [str(SERVERS["etcd"]), *data, *urls])
        port = free_port()
        store = str(self._directory / "nats")
        self._spawn("nats", [str(SERVERS["nats-server"]), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", store])
        self.wait_until(lambda: _listens(int(clients.rpartition(":")[2])) and _listens(port))
        self._environment |= {
            "DYN_DISCOVERY_BACKEND": "etcd",
            "ETCD_ENDPOINTS": clients,
            "DYN_EVENT_PLANE": "nats",
            "DYN_REQUEST_PLANE": "nats",
            "NATS_SERVER": f"nats://127.0.0.1:{port}",
        }

    def start_node(self, **environment: str) -> None:
        self._start("node", "flexkv.cli", "serve", "--name", _NODE, FLEXKV_CPU_CACHE_GB="128MB", **environment)

    def start_frontend(self, *arguments: str) -> None:
        self._start("frontend", "dynamo.frontend", "--http-port", str(self._port), *arguments)

    def start_worker(
        self, name: str, model: Path, connector: dict[str, Any], *arguments: str, **environment: str
    ) -> Worker:
        events = {"publisher": "zmq", "enable_kv_cache_events": True, "endpoint": f"tcp://*:{free_port()}"}
        port = free_port()
        options = {
            "--model": str(model),
            "--served-model-name": MODEL,
            "--dtype": "float32",
            "--seed": "0",
            "--max-model-len": str(MAX_TOKENS),
            "--max-num-seqs": "16",
            "--max-num-batched-tokens": "512",
            "--block-size": str(BLOCK),
            "--num-gpu-blocks-override": str(POOL_BLOCKS),
            "--kv-cache-memory-bytes": str(256 << 20),
            "--kv-transfer-config": json.dumps(connector),
            "--kv-events-config": json.dumps(events),
        }
        given = [part for option in options.items() for part in option]
        process = self._start(
            name,
            "dynamo.vllm",
            *given,
            "--enforce-eager",
            *arguments,
            FLEXKV_NODE=_NODE,
            DYN_SYSTEM_PORT=str(port),
            VLLM_NIXL_SIDE_CHANNEL_PORT=str(free_port()),
            **environment,
        )
        return Worker(name, process, port)

    def wait_until_ready(self, *workers: Worker) -> None:
        def waits_for() -> list[str]:
            missing = [worker.name for worker in workers if not worker.ready]
            return missing or ["frontend"] * (not self._serves())

        self.wait_until(lambda: not waits_for(), waits_for)

    def wait_until(self, condition: Callable[[], bool], waits_for: Callable[[], list[str]] = list) -> None:
        """`waits_for`: whose logs are of interest if it does not come."""
        deadline = time.monotonic() + _HANG_SECONDS
        while not condition():
            ended = [name for name, process in self._processes.items() if process.poll() not in (None, -signal.SIGKILL)]
            assert not ended, f"ended: {ended}\n{self._logs(ended)}"
            if time.monotonic() > deadline:
                late = waits_for()
                for pid in marked_processes(self._mark):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGABRT)
                time.sleep(1)
                raise AssertionError(f"not in {_HANG_SECONDS} s: {late or 'what was waited for'}\n{self._logs(late)}")
            time.sleep(0.1)

    def ask(self, prompt: list[int], max_tokens: int, worker: int | None = None, **more: int) -> Answer:
        """`worker`: who has to serve it; else the router decides. `more`: directions of Dynamo's. Raises Refused."""
        directions: dict[str, Any] = {"extra_fields": ["worker_id", "timing", "completion_token_ids"], **more}
        if worker is not None:
            directions["backend_instance_id"] = worker
        answer = self._complete(prompt, max_tokens, directions)
        about = answer["nvext"]
        return Answer(
            worker=about["worker_id"]["decode_worker_id"],
            tokens=about["completion_token_ids"],
            cached=answer["usage"]["prompt_tokens_details"]["cached_tokens"] or 0,
            foreseen=about["timing"].get("kv_hit_rate") or 0.0,
        )

    def chosen(self, prompt: list[int]) -> int:
        """The worker that the router would send it to now; it is not sent."""
        directions = {"extra_fields": ["worker_id"], "annotations": ["query_instance_id:"]}
        return int(self._complete(prompt, 1, directions)["nvext"]["worker_id"]["decode_worker_id"])

    def node_status(self) -> dict[str, Any]:
        from flexkv import _core

        return dict(json.loads(_core.query_status(str(self._runtime / f"{_NODE}.sock"))))

    def lines_with(self, text: str) -> list[str]:
        """Of all logs."""
        logs = [log.read_text(errors="replace") for log in self._directory.glob("*.log")]
        return [line for log in logs for line in log.splitlines() if text in line]

    def _logs(self, of_interest: list[str]) -> str:
        """The last lines of all logs; those of interest come last, and are longer."""
        logs = sorted(self._directory.glob("*.log"), key=lambda log: log.stem in of_interest)
        return "\n".join(f"== {log}\n{_last_lines(log, 200 if log.stem in of_interest else 20)}" for log in logs)

    def _complete(self, prompt: list[int], max_tokens: int, directions: dict[str, Any]) -> dict[str, Any]:
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "nvext": directions,
        }
        return _get(f"http://127.0.0.1:{self._port}/v1/completions", body)

    def _serves(self) -> bool:
        with contextlib.suppress(OSError, Refused):
            return bool(_get(f"http://127.0.0.1:{self._port}/v1/models")["data"])
        return False

    def _start(self, name: str, module: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        return self._spawn(name, [PYTHON, "-P", "-m", module, *arguments], **environment)

    def _spawn(self, name: str, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        with (self._directory / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env=self._environment | environment,
                start_new_session=True,
            )
        self._processes[name] = process
        return process


_claims: list[socket.socket] = []


def free_port() -> int:
    """Below those that the system gives away by itself; Dynamo takes none above 32767 for DYN_SYSTEM_PORT. Even, as vLLM
    may take the next one, too. No other test gets it as long as we live: who is to listen there begins much later."""
    while True:
        port = random.randrange(10000, 32768, 2)
        claim = socket.socket(socket.AF_UNIX)
        with socket.socket() as listener, contextlib.suppress(OSError):
            claim.bind(f"\0flexkv-e2e-port-{port}")
            listener.bind(("0.0.0.0", port))
            _claims.append(claim)
            return port
        claim.close()


def _last_lines(log: Path, count: int) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    return "\n".join([line for line in plain.splitlines() if _ASKED_IN_VAIN not in line][-count:])


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def _get(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_HANG_SECONDS) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        raise Refused(f"{error.code} {error.read().decode(errors='replace')}") from None


def _counter(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)}{{[^\n]*}} (\S+)$", text, re.MULTILINE)
    assert found, name
    return float(found[1])
