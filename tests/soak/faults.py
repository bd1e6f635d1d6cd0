"""What goes wrong while the engines work, from one thread, at random times."""

from __future__ import annotations

import heapq
import os
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from flexkv import _core
from soak.fleet import ENGINES, Fleet

# Mean seconds between two.
_PERIODS = {
    "kill_engine": 20.0,
    "stop_engine": 40.0,
    "kill_daemon": 60.0,
    "stop_daemon": 30.0,
    "damage_blocks": 3.0,
    "damage_records": 15.0,
    "truncate": 45.0,
    "make_read_only": 50.0,
    "fill_drive": 70.0,
    "hang_drive": 40.0,
    "lose_drive": 55.0,
    "reset_node": 90.0,
}
_READ_ONLY_S = 6.0
_FULL_S = 10.0
# Past the deadline of loads and the time after which a drive is switched off; no longer, as a process that is killed
# ends only when its drive has answered.
_HANG_S = (0.5, 6.0)
_LOST_S = (0.5, 10.0)


class Faults:
    def __init__(
        self,
        fleet: Fleet,
        seed: int,
        small: Path | None,
        drive: Callable[[str, float], None] | None,
        spare_daemon_from: float,
    ) -> None:
        """`small`: a directory on a file system that can be filled. `drive`: makes a drive "hang" or "fail" for so many
        seconds. From `spare_daemon_from` on (monotonic) the daemon
        lives, so that one has the time to show what grows in it."""
        self._fleet = fleet
        self._draw = random.Random(f"{seed} faults")
        self._small = small
        self._drive = drive
        self._drive_serves_at = 0.0
        self._spare_daemon_from = spare_daemon_from
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._end = threading.Event()
        self._undo: list[Callable[[], None]] = []
        self.counts: Counter[str] = Counter()
        # Held while the daemon is not there or not answering, because it was made to.
        self.daemon_away = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="faults")

    def start(self) -> None:
        for name in _PERIODS:
            self._again(name)
        self._thread.start()

    def finish(self) -> None:
        """Ends all faults and what they have left."""
        self._end.set()
        self._thread.join()
        for undo in self._undo:
            undo()

    def _again(self, name: str) -> None:
        period = _PERIODS[name]
        self._at(period * self._draw.uniform(0.6, 1.4), lambda: self._do(name))

    def _at(self, delay: float, what: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (time.monotonic() + delay, self._number, what))

    def _do(self, name: str) -> None:
        self._again(name)
        if getattr(self, f"_{name}")() is not False:
            self.counts[name] += 1

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                wait = self._events[0][0] - time.monotonic() if self._events else 1.0
                if wait > 0:
                    self._end.wait(wait)
                    continue
                heapq.heappop(self._events)[2]()
        except Exception as error:
            self._fleet.problem("the faults ended", error=repr(error))
        finally:
            if self._fleet.daemon.stopped_since is not None:
                self._resume_daemon()
            for process in self._fleet.engines:
                process.resume()

    # ---- processes

    def _kill_engine(self) -> None:
        number = self._draw.randrange(1, len(ENGINES))
        gently = self._draw.random() < 0.25
        self._fleet.end_engine(number, gently)
        self.counts["of them by SIGTERM"] += gently
        self._fleet.start_engine(number)

    def _stop_engine(self) -> bool | None:
        process = self._fleet.engines[self._draw.randrange(len(ENGINES))]
        if process.stopped_since is not None:
            return False
        process.stop()
        self._at(self._draw.uniform(0.2, 5.0), process.resume)
        return None

    def _stop_daemon(self) -> bool | None:
        if self._fleet.daemon.stopped_since is not None:
            return False
        self.daemon_away.acquire()
        self._fleet.daemon.stop()
        pid = self._fleet.daemon.pid
        self._at(
            self._draw.choice((0.1, 1.0, 2.0, 7.0)),
            lambda: self._resume_daemon() if self._fleet.daemon.pid == pid else None,
        )
        return None

    def _resume_daemon(self) -> None:
        if self._fleet.daemon.stopped_since is None:
            return
        self._fleet.daemon.resume()
        self.daemon_away.release()

    def _kill_daemon(self) -> bool | None:
        if time.monotonic() > self._spare_daemon_from:
            return False
        gently = self._draw.random() < 0.25
        stopped = self._fleet.daemon.stopped_since is not None
        if not stopped:
            self.daemon_away.acquire()
        try:
            begin = self._fleet.end_daemon(gently)
            self.counts["daemons by SIGTERM"] += gently
            if self._draw.random() < 0.5:
                self._damage_blocks()
                self._damage_records()
            if self._draw.random() < 0.3:
                self._truncate()
            time.sleep(self._draw.choice((0.0, 0.2, 2.0)))
            self._fleet.start_daemon()
            self._fleet.daemon.away.append((begin, time.monotonic()))
        finally:
            self.daemon_away.release()
        return None

    def _reset_node(self) -> bool | None:
        if self._fleet.daemon.stopped_since is not None:
            return False
        begin = time.monotonic()
        _core.reset(self._fleet.socket)
        if time.monotonic() - begin > 2:
            self._fleet.problem("slow reset", seconds=time.monotonic() - begin)
        return None

    # ---- drives

    def _file(self, suffix: str) -> Path | None:
        found = [path for one in self._fleet.directories for path in one.glob(f"*{suffix}") if path.stat().st_size > 0]
        return self._draw.choice(sorted(found)) if found else None

    def _write(self, suffix: str, places: int) -> bool:
        path = self._file(suffix)
        if path is None:
            return False
        try:
            with path.open("r+b", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                for _ in range(places):
                    file.seek(self._draw.randrange(max(size, 1)))
                    file.write(self._draw.randbytes(self._draw.choice((1, 8, 64, 4096))))
                os.fdatasync(file.fileno())
        except OSError:
            return False  # read-only or full just now
        return True

    def _damage_blocks(self) -> bool:
        return self._write(".blocks", self._draw.randint(1, 16))

    def _damage_records(self) -> bool:
        return self._write(".records", self._draw.randint(1, 4))

    def _truncate(self) -> bool:
        path = self._file(self._draw.choice((".blocks", ".blocks", ".records")))
        if path is None:
            return False
        try:
            os.truncate(path, int(path.stat().st_size * self._draw.uniform(0, 1)))
        except OSError:
            return False
        return True

    def _make_read_only(self) -> bool:
        """Files and directory immutable: the only thing that stops root's writes to files that are open."""
        directory = self._draw.choice(self._fleet.directories)
        names = [str(directory), *(str(path) for path in directory.glob("*.*"))]

        def undo() -> None:
            present = [str(directory), *(str(path) for path in directory.glob("*.*"))]
            subprocess.run(["chattr", "-i", *present], check=False, capture_output=True)

        if subprocess.run(["chattr", "+i", *names], check=False, capture_output=True).returncode != 0:
            undo()
            return False
        self._undo.append(undo)
        self._at(_READ_ONLY_S, undo)
        return True

    def _hang_drive(self) -> bool:
        return self._drive_fault("hang", self._draw.uniform(*_HANG_S))

    def _lose_drive(self) -> bool:
        return self._drive_fault("fail", self._draw.uniform(*_LOST_S))

    def _drive_fault(self, fault: str, seconds: float) -> bool:
        if self._drive is None or time.monotonic() < self._drive_serves_at:
            return False
        self._drive(fault, seconds)
        self._drive_serves_at = time.monotonic() + seconds
        return True

    def _fill_drive(self) -> bool:
        if self._small is None:
            return False
        ballast = self._small / "ballast"

        def undo() -> None:
            ballast.unlink(missing_ok=True)

        try:
            with ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 20))
        except OSError:
            pass
        self._undo.append(undo)
        self._at(_FULL_S, undo)
        return True
