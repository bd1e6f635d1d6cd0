"""Stands in for flexkv._core: a node that listens on a real socket and keeps its status in a file beside it.

Run as a script it is the `flexkv` command with this core."""

import json
import os
import select
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS: dict[str, Any] = {
    "node": {
        "name": "default",
        "pid": os.getpid(),
        "mode": "daemon",
        "version": "9.9",
        "uptime_s": 4000.5,
        "resets": 3,
    },
    "pool": {"bytes": 1 << 34, "used_bytes": 1 << 33, "page_kind": "4 KiB pages"},
    "spaces": [{"id": 1, "model": "[red]llama", "block_bytes": 1 << 21, "slots": 8192, "used": 4096, "reserved": 16}],
    "engines": [{"id": "e1", "ranks": 2, "attached_ranks": 1, "model": "llama", "state": "serving"}],
    "lookups": {
        "count": 10,
        "blocks_queried": 1000,
        "blocks_hit": 900,
        "miss_blocks": {"never_seen": 90, "evicted": 10},
    },
    "saves": {"count": 5, "blocks": 100, "refused_blocks": {"pool_full": 3}},
    "loads": {"count": 9, "blocks": 900, "bytes": 1887436800},
    "transfers": {
        "to_device": {
            "bytes": 4_000_500_000,
            "blocks": 900,
            "jobs": 9,
            "failed": 0,
            "latency_us": {
                "p50": 80,
                "p90": 1200,
                "p99": 2_500_000,
                "max": 3e6,
                "count": 9,
                "bounds_us": [100, 1000],
                "counts": [6, 2, 1],
                "sum_us": 1100,
            },
        },
        "to_host": {"bytes": 0, "blocks": 0, "jobs": 0, "failed": 0},
    },
    "queues": {"loads": 0, "saves": 1, "peers": 2},
    "health": {"state": "degraded", "messages": ["pool is full"]},
}

# What a node with drives says in addition.
DISK: dict[str, Any] = {
    "drives": [
        {
            "directory": "/mnt/[a]",
            "form": "/mnt/[a] (xfs): io_uring with registered files, direct",
            "reads": True,
            "writes": True,
            "why": "",
            "bytes": 1 << 40,
            "used_bytes": 1 << 39,
            "queued": 7,
            "blocks_written": 3000,
            "blocks_read": 2000,
            "bytes_written": 6 << 30,
            "bytes_read": 4 << 30,
            "checksum_failures": 1,
            "failed_reads": 2,
            "failed_writes": 3,
            "quarantined_slots": 0,
            "endurance": {
                "written_bytes": 3 << 40,
                "last_day_bytes": 1 << 37,
                "daily_bytes": 1 << 39,
                "bytes_per_day": 1 << 37,
                "days_left": 600.5,
                "pressure": 0.25,
            },
        },
        {"directory": "/mnt/b", "reads": True, "writes": False, "why": "no space", "bytes": 1 << 40, "used_bytes": 0},
        {"directory": "/mnt/c", "reads": False, "writes": False, "why": "an I/O hangs for 2000 ms"},
    ],
    "opened": [
        {
            "recovered_blocks": 120_000,
            "seconds": 1.25,
            "discarded": {"damaged": 3, "other_epoch": 0, "orphan": 40},
            "dropped_files": ["/mnt/b: old blocks are not used: they missed a reset"],
        }
    ],
    "recovered_blocks": 120_000,
    "evicted_blocks": 5,
    "prefetched_blocks": 6,
    "read_bytes_per_s": 3.5e9,
    "choices": {
        "policy": "auto",
        "all": 41,
        "part": 0,
        "none": 2,
        "recomputed_blocks": 333,
        "latest": [
            {"seconds_ago": 90.0, "chosen_blocks": 77, "drive_blocks": 77, "basis": "reads_unknown"},
            {
                "seconds_ago": 2.0,
                "engine": "e1",
                "sequence": 5,
                "prompt_blocks": 1400,
                "engine_blocks": 40,
                "host_blocks": 60,
                "coming_blocks": 20,
                "drive_blocks": 1200,
                "chosen_blocks": 100,
                "basis": "cost",
                "read_bytes_per_s": 3.5e9,
                "read_wait_us": 0.0,
                "engine_wait_us": 0.0,
                "requests_behind": 0,
                "expected_us": 540_000.0,
                "expected_if_all_us": 700_000.0,
                "expected_if_none_us": 650_000.0,
            },
        ],
    },
    "endurance": {
        "written_bytes": 5 << 40,
        "last_day_bytes": 1 << 38,
        "daily_bytes": 1 << 40,
        "bytes_per_day": 1 << 38,
        "days_left": 1234.5,
        "pressure": 0.125,
    },
    "admission": {"admitted": 100, "refused_first_touch": 900, "refused_budget": 0},
}
def scrub_of(directory: str, state: str, damaged: int = 0, unchecked: int = 0) -> dict[str, Any]:
    """A check of the drives that has come so far."""
    checked = {"checked_blocks": 900, "checked_bytes": 900 << 20, "damaged_blocks": damaged}
    return {
        "state": state,
        "bytes_per_s": 100 << 20,
        "blocks": 1000,
        "bytes": 1000 << 20,
        "seconds": 75.0,
        "ended_seconds_ago": None if state == "running" else 130.0,
        "drives": [{"directory": directory, "unreadable_blocks": 0, "unchecked_blocks": unchecked} | checked],
    }


DISK["scrub"] = scrub_of("/mnt/[a]", "done", damaged=2)
WITH_DISK: dict[str, Any] = STATUS | {
    "disk": DISK,
    "spaces": [STATUS["spaces"][0] | {"disk_slots": 1 << 20, "disk_used": 120_000, "recovering": True}],
    "lookups": STATUS["lookups"] | {"disk_blocks_hit": 321},
    "evictions": {"blocks": 11},
    "transfers": STATUS["transfers"]
    | {
        "from_disk": {
            "blocks": 2000,
            "bytes": 4 << 30,
            "failed_blocks": {"deadline": 3, "checksum": 1},
            # As the node writes it: one count for each bound.
            "latency_us": {"count": 2000, "p50": 700, "sum_us": 1e6, "bounds_us": [500, 1000], "counts": [500, 1500]},
        },
        "to_disk": {"blocks": 3000, "bytes": 6 << 30, "failed_blocks": {}, "latency_us": {}},
    },
}


class Node:
    room = 1 << 45  # of pools
    unusable: dict[str, str] = {}  # directories of drives, and why

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.socket: socket.socket | None = None
        self.path = Path()

    def listen(self, runtime_dir: str, name: str) -> None:
        if self.options["pool_bytes"] > self.room:
            raise MemoryError("host memory: the machine has too little")
        self.path = Path(runtime_dir) / f"{name}.sock"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.bind(str(self.path))
        self.socket.listen()
        self.path.with_suffix(".status").write_text(self.status())

    def wait(self, stop_fd: int) -> None:
        select.select([stop_fd], [], [])

    def status(self) -> str:
        node = STATUS["node"] | {"name": self.path.stem, "pid": os.getpid()}
        pool = STATUS["pool"] | {"bytes": self.options["pool_bytes"]}
        return json.dumps(STATUS | {"node": node, "pool": pool, "disk": self.disk()})

    def disk(self) -> dict[str, Any] | None:
        directories = self.options.get("ssd_directories", [])
        if not self.options.get("ssd_bytes") or not directories:
            return None
        share = self.options["ssd_bytes"] // len(directories)
        return {
            "drives": [
                {"directory": one, "reads": one not in self.unusable, "why": self.unusable.get(one, ""), "bytes": share}
                for one in directories
            ]
        }

    def drain(self, timeout_s: float) -> bool:
        print(f"drains for {timeout_s:g} s", flush=True)
        return True

    def stop(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.path.unlink()
            print("stopped", flush=True)


def query_status(path: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(path)
    return Path(path).with_suffix(".status").read_text()


def drain(path: str, timeout_s: float) -> str:
    """Is done once `late`, a file beside the socket, is not there; else it never is. `host_only` has a number."""
    status = json.loads(query_status(path))
    late = Path(path).with_suffix(".late").exists()
    status["node"]["drain"] = {"state": "late" if late else "drained", "jobs": 2 * late, "disk_writes": 1000 * late}
    host_only = Path(path).with_suffix(".host_only")
    if host_only.exists():
        status["node"]["drain"] |= {"host_only_blocks": int(host_only.read_text()) * late, "offered_blocks": 700}
    Path(path).with_suffix(".status").write_text(json.dumps(status))
    return json.dumps(status)


def scrub(path: str, bytes_per_second: int) -> str:
    status = json.loads(query_status(path))
    if bytes_per_second == 0:
        status["disk"]["scrub"] |= {"state": "stopped"}
    status["disk"]["scrub"] |= {"bytes_per_s": bytes_per_second}
    Path(path).with_suffix(".status").write_text(json.dumps(status))
    return json.dumps(status)


def disk_check(directory: str, bytes_per_second: int, progress: Callable[[int, int], None]) -> dict[str, Any]:
    _refuse_used(directory)
    bad = int((Path(directory) / "bad").exists())
    progress(1 << 20, 2 << 20)
    progress(2 << 20, 2 << 20)
    problems = ["space 01: block 7: its checksum is wrong"] * bad
    rate = {"bytes_per_second": bytes_per_second}
    return {"blocks": 1000, "bytes": 2 << 20, "bad_blocks": bad, "unreadable_blocks": 0, "problems": problems} | rate


def disk_contents(directory: str) -> dict[str, Any]:
    if (Path(directory) / "foreign").exists():
        raise ValueError("not an SSD cache directory (there is no node.secret)")
    _refuse_used(directory)
    names = sorted(path.name for path in Path(directory).iterdir() if path.suffix not in (".blocks", ""))
    size = sum(file.stat().st_size for file in Path(directory).glob("*.blocks"))
    return {"bytes": size, "foreign_count": len(names), "foreign": names[:1]}


def disk_clear(directory: str) -> int:
    _refuse_used(directory)
    files = list(Path(directory).glob("*.blocks"))
    freed = sum(file.stat().st_size for file in files)
    for file in files:
        file.unlink()
    return freed


def _refuse_used(directory: str) -> None:
    if (Path(directory) / "used").exists():
        raise RuntimeError(f"the SSD cache directory {directory} is in use by the process 4711")


def build_info() -> dict[str, str]:
    return {"compiler": "none"}


if __name__ == "__main__":
    import flexkv.cli

    sys.modules["flexkv._core"] = sys.modules["__main__"]
    flexkv.cli.main()
