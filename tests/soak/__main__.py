"""Command of the soak: see scripts/soak."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from soak import report, verdict
from soak.faults import Faults
from soak.fleet import ENGINES, Fleet, share_bytes
from soak.watch import Watch

_SAMPLE_S = 10.0
_DAEMON_KILLED_SHARE = 0.6  # of the time; in the rest one daemon shows what grows in it
_DRAIN_S = 60.0  # a drive that was switched off is probed every 30 s at most


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def _small_drive(work: Path) -> Iterator[Path | None]:
    """A file system in a file that is smaller than what a directory may take; None where mounting is not allowed."""
    image, folder = work / "small.img", work / "small"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(share_bytes(3) * 3 // 4)
    made = subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=False, capture_output=True)
    if made.returncode == 0:
        made = subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=False, capture_output=True)
    if made.returncode != 0:
        print(f"  no small drive that fills up: {made.stderr.decode().strip()}")
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@contextlib.contextmanager
def _faulty_drive(directory: Path, point: Path) -> Iterator[Callable[[str, float], None] | None]:
    """Shows the directory at `point`; what makes it hang or fail. None where mounting is not allowed."""
    point.mkdir()
    command = [sys.executable, "-P", "-m", "soak.drive", str(directory), str(point)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as drive:
        assert drive.stdin is not None and drive.stdout is not None
        try:
            if drive.stdout.readline() != "ready\n":
                print("  no drive that hangs and disappears: FUSE cannot be mounted")
                yield None
                return

            def fault(kind: str, seconds: float) -> None:
                print(kind, seconds, file=drive.stdin, flush=True)

            yield fault
        finally:
            subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True)
            drive.stdin.close()


def _wait(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _idle(fleet: Fleet) -> bool:
    status = fleet.status()
    return (
        status is not None
        and not any(status["queues"][name] for name in ("jobs_in_flight", "disk_fetches", "disk_writes"))
        and not any(engine["sequences"] for engine in status["engines"])
        and not any(space["reserved"] for space in status["spaces"])
    )


def _wind_down(fleet: Fleet, watch: Watch) -> None:
    """Without load and faults everything has to become empty, and everyone has to end."""
    for process in fleet.engines:
        if not process.running():
            fleet.problem("engine ended by itself", engine=process.name)
            continue
        os.kill(process.pid, signal.SIGUSR1)
    if not _wait(lambda: all((fleet.engine_state(n) or {}).get("drained") for n in range(len(ENGINES))), _DRAIN_S):
        fleet.problem("engines still wait for something", states=[fleet.engine_state(n) for n in range(len(ENGINES))])
    if not _wait(lambda: _idle(fleet), _DRAIN_S):
        status = fleet.status() or {}
        fleet.problem("not empty without load", **{key: status.get(key) for key in ("queues", "engines", "spaces")})
    watch.sample()
    for number in range(len(ENGINES)):
        fleet.end_engine(number, gently=True)
    if not _wait(lambda: not (fleet.status() or {"engines": [1]})["engines"], 10):
        fleet.problem("engines are not forgotten", engines=(fleet.status() or {}).get("engines"))
    watch.sample()
    fleet.end_daemon(gently=True)
    if left := [name for name in os.listdir(fleet.runtime) if name.endswith((".sock", ".tmp"))]:
        fleet.problem("left in the runtime directory", names=left)


def _line(sample: dict[str, Any]) -> str:
    processes = " ".join(
        f"{name}.{seen['incarnation']}:{seen['RssAnon'] >> 20}M/{seen['fds']}fd/{seen['threads']}t"
        for name, seen in sample["processes"].items()
    )
    queues = (sample["status"] or {}).get("queues", "daemon away")
    return f"  {sample['t_s']:6.0f} s  {processes}  {queues}"


def _soak(
    fleet: Fleet, small: Path | None, drive: Callable[[str, float], None] | None, seconds: float
) -> dict[str, Any]:
    begin = time.monotonic()
    fleet.start_daemon()
    for number in range(len(ENGINES)):
        fleet.start_engine(number)
    faults = Faults(fleet, fleet.seed, small, drive, begin + _DAEMON_KILLED_SHARE * seconds)
    watch = Watch(fleet, faults, begin)
    faults.start()
    cpu = os.times()
    next_sample = begin + _SAMPLE_S
    try:
        while time.monotonic() < begin + seconds:
            time.sleep(max(0.0, min(next_sample, begin + seconds) - time.monotonic()))
            next_sample += _SAMPLE_S
            print(_line(watch.sample()), flush=True)
    finally:
        faults.finish()
    took = time.monotonic() - begin
    loaded = len(watch.samples)
    _wind_down(fleet, watch)
    used = os.times()
    figures = {
        "CPU seconds of all processes": used.children_user + used.children_system - cpu.children_user - cpu.children_system,
        "daemon starts, longest s": max(fleet.start_times),
        "daemon starts, mean s": sum(fleet.start_times) / len(fleet.start_times),
        "log bytes a minute": watch.samples[-1]["log_bytes"] / took * 60,
        "status answered within s": max(s["status"]["took_s"] for s in watch.samples if s["status"] is not None),
    }
    return _result(fleet, faults, watch, loaded, took, figures)


def _result(
    fleet: Fleet, faults: Faults, watch: Watch, loaded: int, took: float, figures: dict[str, float]
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    longest: dict[str, float] = {}
    for path in fleet.out.glob("*.json"):
        state = json.loads(path.read_text())
        counts.update(state["counts"])
        for name, value in state["longest_s"].items():
            longest[name] = max(longest.get(name, 0.0), value)
    reports = []
    if (file := fleet.out / "reports.jsonl").exists():
        reports = [json.loads(line) for line in file.read_text().splitlines()]
    away = {process.name: process.away for process in (fleet.daemon, *fleet.engines)}
    wrong = [one for one in reports if not verdict.excused(one, away)]
    figures["late only because a process was away"] = len(reports) - len(wrong)
    problems = fleet.problems + wrong
    problems += verdict.over_limit(watch.samples, share_bytes(len(fleet.directories)))
    warm_up_s = min(60.0, took / 8)
    trends = verdict.process_trends(watch.samples[:loaded], warm_up_s)
    trends += verdict.queue_trends(watch.samples[:loaded], warm_up_s)
    problems += [{"kind": "grows", **one.as_json()} for one in trends if one.grows]
    if counts["loads right"] == 0:
        problems.append({"kind": "nothing was loaded"})
    status = next(s["status"]["whole"] for s in reversed(watch.samples) if s["status"] is not None)
    disk = status["disk"] or {}
    return {
        "minutes": took / 60,
        "seed": fleet.seed,
        "ok": not problems,
        "problems": problems,
        "faults": dict(sorted(faults.counts.items())),
        "counts": dict(sorted(counts.items())),
        "longest_s": dict(sorted(longest.items())),
        "figures": figures,
        "node": {
            "of the last daemon, minutes": status["node"]["uptime_s"] / 60,
            "to device, blocks": status["transfers"]["to_device"]["blocks"],
            "to host, blocks": status["transfers"]["to_host"]["blocks"],
            "from drives, blocks": status["transfers"]["from_disk"]["blocks"],
            "from drives, failed": str(status["transfers"]["from_disk"]["failed_blocks"]),
            "to drives, blocks": status["transfers"]["to_disk"]["blocks"],
            "to drives, failed": str(status["transfers"]["to_disk"]["failed_blocks"]),
            "evicted from host memory": status["evictions"]["blocks"],
            "evicted from drives": disk.get("evicted_blocks", 0),
            "loads failed": str(status["loads"]["failed"]),
            "health": str(status["health"]),
        },
        "reports": reports,
        "away": away,
        "trends": [one.as_json() for one in trends],
        "samples": watch.samples,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description="A node under full load and faults: does anything grow?")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30), help="of what happens; not of when")
    parser.add_argument("--out", type=Path, default=Path("out/soak"), help="folder for soak.json and soak.png")
    parser.add_argument("--json", action="store_true", help="print soak.json, without its samples, instead of tables")
    parser.add_argument("--dir", type=Path, help="where the drives' directories are made (default: the temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep the directories and logs of the run")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # processes and mounts must not stay behind
    work = Path(tempfile.mkdtemp(prefix="flexkv-soak-", dir=given.dir))
    result: dict[str, Any] = {}
    # What is printed on the way is no part of the JSON.
    with contextlib.redirect_stdout(sys.stderr if given.json else sys.stdout), contextlib.ExitStack() as stack:
        print(f"seed {given.seed}, in {work}")
        small = stack.enter_context(_small_drive(work))
        directories = [work / "ssd-a", work / "ssd-b", *([small / "ssd-small"] if small is not None else ())]
        for directory in directories:
            directory.mkdir(mode=0o700)
        point = work / "drive-a"
        drive = stack.enter_context(_faulty_drive(directories[0], point))
        mounts = {directories[0]: point} if drive is not None else {}
        fleet = Fleet(work, directories, given.seed, _free_port(), mounts)
        try:
            result = _soak(fleet, small, drive, given.minutes * 60)
        finally:
            for process in (*fleet.engines, fleet.daemon):
                if process.running():
                    process.kill()
            shutil.copytree(fleet.logs, given.out / "logs", dirs_exist_ok=True)
    (given.out / "soak.json").write_text(json.dumps(result))
    report.plot(result["samples"], given.out / "soak.png")
    if given.json:
        print(json.dumps({key: value for key, value in result.items() if key not in ("samples", "reports", "away")}, indent=1))
    else:
        report.print_report(result)
        print(f"\n{'OK' if result['ok'] else 'FAILED'}; {given.out}/soak.json, soak.png, logs")
    if result["ok"] and not given.keep:
        shutil.rmtree(work, ignore_errors=True)
    else:
        print(f"kept: {work}", file=sys.stderr)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
