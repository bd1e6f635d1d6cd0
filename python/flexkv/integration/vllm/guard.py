"""No exception of ours may reach an engine's thread: there it would end the engine, here it costs a cache hit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger("flexkv.vllm")
_F = TypeVar("_F", bound=Callable[..., Any])
_seen: set[str] = set()


def never_raises(fallback: Callable[[], Any]) -> Callable[[_F], _F]:
    """Turns an exception of the method into `fallback()`, logged with its traceback the first time."""

    def decorate(method: _F) -> _F:
        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except Exception as error:
                name = method.__qualname__
                first = name not in _seen
                _seen.add(name)
                logger.error("FlexKV: %s failed (%s); the engine goes on without it", name, error, exc_info=first)
                return fallback()

        return guarded  # type: ignore[return-value]

    return decorate
