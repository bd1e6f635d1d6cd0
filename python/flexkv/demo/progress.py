"""How far the demo is: a bar on a terminal, else plain lines, so that logs of a CI show it too."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

_LINE_SECONDS = 10.0


class DemoProgress:
    """One phase at a time: its title, and steps of it that are done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeElapsedColumn(), console=console)
        self._title = ""
        self._total = self._done = 0
        self._task = TaskID(0)
        self._next_line = 0.0

    def __enter__(self) -> DemoProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, title: str, what: str, total: int) -> None:
        """A phase, which begins with `what`; then its steps are counted."""
        self._title, self._total, self._done = title, total, 0
        if self._bar is not None:
            self._task = self._bar.add_task(f"{title}: {what}", total=total)
        else:
            self._print(f"{title}: {what}")

    def say(self, what: str) -> None:
        """What the phase does now."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._title}: {what}")

    def advance(self, unit: str) -> None:
        """One more step is done. Plain lines come at most every ten seconds, but always the last."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif self._done == self._total or time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            self._print(f"{self._title}: {self._done} of {self._total} {unit}")

    def end(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=self._title)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
