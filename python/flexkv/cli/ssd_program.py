"""The program behind the figures of drives, `flexkv-bench ssd`: it has the files, and measures what it is told to."""

from __future__ import annotations

import json
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from flexkv.cli.run_bench import program
from flexkv.config.sizes import MIB

# As the program has them.
DEPTH = 32  # blocks under way at once, at most
BLOCK_BYTES_MAX = 4 * MIB
FILE_BYTES_MIN = 256 * MIB
PATIENCE = 60.0  # seconds for an answer beyond what was asked to take


class BenchError(Exception):
    """What a person can do something about."""


class ProgramError(Exception):
    """`flexkv-bench` has ended, or does not answer: nothing more can be measured."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """So that what has to go, goes. (The files go in any case: the program removes them when it hears no more of us.)"""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class SsdProgram:
    """`flexkv-bench ssd`: makes the files, measures what it is told to, removes the files."""

    def __init__(self, directories: list[str], bytes_each: int) -> None:
        self.files: list[str] = []
        self.bytes_each = bytes_each
        self._process = subprocess.Popen(
            [str(program()), "ssd", str(bytes_each), *directories],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us: it is to remove the files before it ends
        )

    def __enter__(self) -> SsdProgram:
        try:
            self.files = self._answer(None)["files"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:  # a drive that hangs
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        for file in self.files:
            shutil.rmtree(Path(file).parent, ignore_errors=True)

    def fill(self) -> dict[str, Any]:
        return self._ask("fill", None)  # takes as long as the drive needs

    def measure(
        self,
        way: str,
        op: str,
        order: str,
        block: int,
        seconds: float,
        seed: int,
        directories: int,
        under_way: int = DEPTH,
    ) -> float:
        """GB/s over the first `directories`. `way`: "drive" (that of the SSD tier) or "threads"; `under_way`: blocks at
        once in each directory, at most DEPTH."""
        line = f"{way} {op} {order} {block} {seconds} {seed} {directories} {under_way}"
        result = self._ask(line, seconds)
        return float(result["bytes"] / result["seconds"] / 1e9)

    def _ask(self, line: str, seconds: float | None) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ended()
        return self._answer(seconds)

    def _answer(self, seconds: float | None) -> dict[str, Any]:
        """The one line that comes for each of ours."""
        assert self._process.stdout is not None
        patience = None if seconds is None else seconds + PATIENCE
        if not select.select([self._process.stdout], [], [], patience)[0]:
            raise ProgramError(f"no answer for {patience:g} s: does the drive hang? See the kernel's log")
        line = self._process.stdout.readline()
        if not line:
            self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(answer["error"])
        return answer

    def _ended(self) -> NoReturn:
        raise ProgramError(f"flexkv-bench ended with code {self._process.wait()}")
