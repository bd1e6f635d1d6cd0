"""What a benchmark does and how far it is, on stderr: a line at its beginning, then a bar on a terminal, else a plain
line now and then."""

from __future__ import annotations

import time
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_LINE_SECONDS = 10.0


class BenchProgress:
    """`about`: what runs, and how long. `total` 0: how many steps there are is not known, or only later."""

    def __init__(self, title: str, about: str, total: int = 0) -> None:
        self._about = about
        self._title, self._total, self._done = title, total, 0
        self._next_line = time.monotonic() + _LINE_SECONDS
        stderr = Console(stderr=True)
        self._plain = not stderr.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[current]}"),
            console=stderr,
            transient=True,
            disable=self._plain,
        )
        self._task = self._bar.add_task(title, total=total or None, current="")

    def __enter__(self) -> BenchProgress:
        typer.echo(f"{self._title}: {self._about}", err=True)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, total: int) -> None:
        self._total = total
        self._bar.update(self._task, total=total)

    def say(self, current: str) -> None:
        """What is measured now."""
        self._bar.update(self._task, current=current)
        if not self._total:
            self._line(current)

    def advance(self, name: str) -> None:
        """The step of this name is done."""
        self._done += 1
        self._bar.update(self._task, advance=1, current=name)
        self._line(f"{self._done} of {self._total} done, last {name}")

    def _line(self, text: str) -> None:
        # A quick benchmark needs none, a long one not many.
        if self._plain and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            typer.echo(f"{self._title}: {text}", err=True)
