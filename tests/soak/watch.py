"""Samples of what may not grow."""

from __future__ import annotations

import os
import time
import urllib.request
from typing import Any

from soak.faults import Faults
from soak.fleet import Fleet, Process

_KIB = ("RssAnon", "RssFile", "RssShmem")


def _thread_name(task: str) -> str:
    try:
        with open(f"{task}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""


def of_process(process: Process) -> dict[str, Any] | None:
    """None: it is just not there."""
    root = f"/proc/{process.pid}"
    out: dict[str, Any] = {"pid": process.pid, "age_s": time.monotonic() - process.started}
    try:
        with open(f"{root}/status") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        names = [_thread_name(f"{root}/task/{task}") for task in os.listdir(f"{root}/task")]
        out["threads"] = sum(not name.startswith("iou-") for name in names)
        out["kernel_workers"] = len(names) - out["threads"]  # of io_uring: they come and go
        out |= {name: int(fields[name].split()[0]) * 1024 for name in _KIB}
        out["fds"] = len(os.listdir(f"{root}/fd"))
        with open(f"{root}/maps") as file:
            out["pool_maps"] = sum("memfd:" in line for line in file)
    except (OSError, KeyError):
        return None
    return out


class Watch:
    def __init__(self, fleet: Fleet, faults: Faults, begin: float) -> None:
        self._fleet = fleet
        self._faults = faults
        self._begin = begin
        self.samples: list[dict[str, Any]] = []

    def sample(self) -> dict[str, Any]:
        fleet = self._fleet
        taken: dict[str, Any] = {"t_s": time.monotonic() - self._begin, "processes": {}}
        for process in (fleet.daemon, *fleet.engines):
            if (seen := of_process(process)) is not None:
                taken["processes"][process.name] = {"incarnation": process.incarnation, **seen}
        taken["disk_bytes"] = fleet.bytes_on_disk()
        taken["leftovers"] = fleet.leftovers()
        taken["log_bytes"] = sum(path.stat().st_size for path in fleet.logs.iterdir())
        taken["status"] = self._status()
        states = [fleet.engine_state(number) for number in range(len(fleet.engines))]
        taken["engines"] = {state["engine"]: state["counts"] for state in states if state is not None}
        self._hung_engines()
        self.samples.append(taken)
        return taken

    def _status(self) -> dict[str, Any] | None:
        if not self._faults.daemon_away.acquire(blocking=False):
            return None
        try:
            begin = time.monotonic()
            status = self._fleet.status()
            took = time.monotonic() - begin
            if status is None:
                self._fleet.problem("no status", seconds=took)
                return None
            self._scrape()
        finally:
            self._faults.daemon_away.release()
        return {
            "took_s": took,
            "queues": status["queues"],
            "sequences": sum(engine["sequences"] for engine in status["engines"]),
            "reserved": sum(space["reserved"] for space in status["spaces"]),
            "used": {f"{space['model']}": [space["used"], space["slots"]] for space in status["spaces"]},
            "metadata_bytes": status["pool"]["metadata_bytes"],
            "drives": [
                {key: drive[key] for key in ("reads", "writes", "queued", "used_bytes", "quarantined_slots")}
                for drive in (status["disk"] or {}).get("drives", ())
            ],
            "whole": status,
        }

    def _scrape(self) -> None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._fleet.metrics_port}/metrics", timeout=5) as answer:
                answer.read()
        except OSError as error:
            self._fleet.problem("no metrics", error=str(error))

    def _hung_engines(self) -> None:
        for number, process in enumerate(self._fleet.engines):
            state = self._fleet.engine_state(number)
            told = state["at"] if state is not None else process.started
            resumed = process.away[-1][1] if process.away else 0.0
            silent = time.monotonic() - max(told, resumed)
            if process.stopped_since is None and silent > 20:
                self._fleet.problem("engine hangs", engine=f"{process.name}.{process.incarnation}", silent_s=silent)
