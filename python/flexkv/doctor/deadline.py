"""Checks that end: what hangs (a resolver, a dead file server) is left behind in its thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Done = TypeVar("Done")


def within(seconds: float, work: Callable[[], Done]) -> Done:
    """What `work` returns or raises; TimeoutError if it takes longer. Its thread keeps no process from ending."""
    ended: queue.SimpleQueue[tuple[Done | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put((work(), None))
        except BaseException as error:
            ended.put((None, error))

    threading.Thread(target=run, name="flexkv-check", daemon=True).start()
    try:
        result, error = ended.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
