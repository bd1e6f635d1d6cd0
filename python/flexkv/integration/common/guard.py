"""No exception of ours may reach an engine's thread: there it would end the engine, here it costs a cache hit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


class Guard:
    """Makes the decorators of one adapter."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._seen: set[str] = set()

    def never_raises(self, fallback: Callable[[], Any]) -> Callable[[_F], _F]:
        """Turns an exception of the method into `fallback()`, logged with its traceback the first time."""

        def decorate(method: _F) -> _F:
            @functools.wraps(method)
            def guarded(*args: Any, **kwargs: Any) -> Any:
                try:
                    return method(*args, **kwargs)
                except Exception as error:
                    name = method.__qualname__
                    first = name not in self._seen
                    self._seen.add(name)
                    self._logger.error(
                        "FlexKV: %s failed (%s); the engine goes on without it", name, error, exc_info=first
                    )
                    return fallback()

            return guarded  # type: ignore[return-value]

        return decorate
