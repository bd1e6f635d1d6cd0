"""The processes of the soak: a daemon and its engines, with what is known about when each could work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexkv import _core
from soak.content import BLOCK_BYTES

POOL_BYTES = 96 << 20
SSD_BYTES = 384 << 20
LOAD_TIMEOUT_MS = 3000
SAVE_TIMEOUT_MS = 5000
_START_S = 20.0
_STOP_S = 10.0  # the node writes what waits for 3 s, and leaves a drive that hangs after 2


@dataclass(frozen=True)
class EngineKind:
    name: str
    space: str
    ranks: int


# The first is never killed: what it holds at the end, it holds after all the faults. The others share a model, so that
# one of them nearly always keeps its memory from the other model.
ENGINES = (EngineKind("engine-0", "soak-tp2", 2), EngineKind("engine-1", "soak-8b", 1), EngineKind("engine-2", "soak-8b", 1))


class Process:
    """One that is started again and again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.incarnation = -1
        self.child: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.stopped_since: float | None = None  # SIGSTOP
        self.away: list[tuple[float, float]] = []  # when it did not work, because it was made to

    def launch(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.incarnation += 1
        with log.open("ab") as file:
            self.child = subprocess.Popen(command, stdout=file, stderr=file, env=environment, stdin=subprocess.DEVNULL)
        self.started = time.monotonic()

    @property
    def pid(self) -> int:
        return self.child.pid if self.child is not None else 0

    def running(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def kill(self) -> None:
        assert self.child is not None
        self.resumed()
        self.child.kill()
        self.child.wait()

    def stop(self) -> None:
        assert self.child is not None
        self.child.send_signal(signal.SIGSTOP)
        self.stopped_since = time.monotonic()

    def resume(self) -> None:
        if self.stopped_since is not None and self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGCONT)
        self.resumed()

    def resumed(self) -> None:
        if self.stopped_since is not None:
            self.away.append((self.stopped_since, time.monotonic()))
            self.stopped_since = None

    def terminate(self, within_s: float) -> tuple[int | None, float]:
        """Its exit status, None if it had to be killed, and how long it took."""
        assert self.child is not None
        self.resume()
        begin = time.monotonic()
        self.child.terminate()
        try:
            status = self.child.wait(within_s)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
            return None, time.monotonic() - begin
        return status, time.monotonic() - begin


@dataclass
class Fleet:
    work: Path
    directories: list[Path]
    seed: int
    metrics_port: int
    mounts: dict[Path, Path] = field(default_factory=dict)  # where the daemon sees a directory, if elsewhere
    problems: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runtime = self.work / "run"
        self.out = self.work / "out"
        self.logs = self.work / "logs"
        for folder in (self.runtime, self.out, self.logs):
            folder.mkdir(mode=0o700, parents=True)
        self.socket = str(self.runtime / "soak.sock")
        self.daemon = Process("daemon")
        self.engines = [Process(kind.name) for kind in ENGINES]
        self.start_times: list[float] = []

    def problem(self, kind: str, **facts: Any) -> None:
        self.problems.append({"kind": kind, "at": time.monotonic(), **facts})
        print(f"  PROBLEM: {kind} {facts}", flush=True)

    # ---- the daemon

    def start_daemon(self) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FLEXKV_")} | {
            "FLEXKV_RUNTIME_DIR": str(self.runtime),
            "FLEXKV_LOAD_TIMEOUT_MS": str(LOAD_TIMEOUT_MS),
            "FLEXKV_SAVE_TIMEOUT_MS": str(SAVE_TIMEOUT_MS),
            "FLEXKV_SSD_LOAD_POLICY": "always",
            # In turn: what admission leaves out and everything, which keeps the drives busy evicting.
            "FLEXKV_SSD_ADMISSION": str((self.daemon.incarnation + 1) % 2),
            "FLEXKV_ENABLE_METRICS": "1",
            "FLEXKV_METRICS_PORT": str(self.metrics_port),
        }
        command = [sys.executable, "-P", "-m", "flexkv.cli", "serve", "--name", "soak"]
        command += ["--cpu-cache", f"{POOL_BYTES}B", "--ssd-cache", f"{SSD_BYTES}B"]
        for directory in self.directories:
            command += ["--ssd-dir", str(self.mounts.get(directory, directory))]
        begin = time.monotonic()
        self.daemon.launch(command, self.logs / "daemon.log", environment)
        while self.status() is None:
            if not self.daemon.running() or time.monotonic() - begin > _START_S:
                self.problem("daemon does not start", status=self.daemon.child and self.daemon.child.poll())
                raise RuntimeError(f"the daemon does not start: see {self.logs}/daemon.log")
            time.sleep(0.02)
        self.start_times.append(time.monotonic() - begin)

    def status(self) -> dict[str, Any] | None:
        try:
            return json.loads(_core.query_status(self.socket))
        except RuntimeError:
            return None

    def end_daemon(self, gently: bool) -> float:
        """Returns since when it has been away."""
        begin = self.daemon.stopped_since or time.monotonic()
        if gently:
            status, took = self.daemon.terminate(_STOP_S)
            if status != 0:
                self.problem("daemon does not end well", status=status, seconds=took)
        else:
            self.daemon.kill()
        return begin

    # ---- engines

    def start_engine(self, number: int) -> None:
        kind, process = ENGINES[number], self.engines[number]
        options = {
            "name": kind.name,
            "incarnation": process.incarnation + 1,
            "space": kind.space,
            "ranks": kind.ranks,
            "seed": self.seed,
            "out": str(self.out),
            "runtime_dir": str(self.runtime),
            "load_timeout_ms": LOAD_TIMEOUT_MS,
            "save_timeout_ms": SAVE_TIMEOUT_MS,
        }
        command = [sys.executable, "-P", "-m", "soak.engine", json.dumps(options)]
        process.launch(command, self.logs / f"{kind.name}.log", os.environ | {"OPENBLAS_NUM_THREADS": "1"})

    def engine_state(self, number: int) -> dict[str, Any] | None:
        process = self.engines[number]
        try:
            return json.loads((self.out / f"{process.name}.{process.incarnation}.json").read_text())
        except FileNotFoundError:
            return None

    def end_engine(self, number: int, gently: bool) -> None:
        process = self.engines[number]
        if not process.running():
            self.problem("engine ended by itself", engine=process.name, status=process.child and process.child.poll())
        elif gently:
            status, took = process.terminate(_STOP_S)
            # The handler is there only once the engine has told something.
            if status != 0 and self.engine_state(number) is not None:
                self.problem("engine does not end well", engine=process.name, status=status, seconds=took)
        else:
            process.kill()

    def bytes_on_disk(self) -> dict[str, int]:
        """Allocated, of all files of each directory."""
        total = {}
        for directory in self.directories:
            total[directory.name] = 0
            for entry in list(os.scandir(directory)):
                try:
                    if entry.name != "lost+found":
                        total[directory.name] += entry.stat().st_blocks * 512
                except FileNotFoundError:
                    continue
        return total

    def leftovers(self) -> dict[str, int]:
        """Names that each start, kill or fault could leave one more of."""
        return {
            "runtime": len(os.listdir(self.runtime)),
            "shm": sum("flexkv" in name.lower() for name in os.listdir("/dev/shm")),
            "ssd": sum(len(os.listdir(directory)) for directory in self.directories),
        }


def share_bytes(directories: int) -> int:
    return SSD_BYTES // directories


def pool_blocks() -> int:
    return POOL_BYTES // BLOCK_BYTES
