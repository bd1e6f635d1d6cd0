"""The SSD tier's settings together: the default directory, what contradicts what, what the core gets."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from flexkv.config.sizes import format_size

if TYPE_CHECKING:
    from flexkv.config.settings import Settings


# What data sheets give drive writes per day for, unless they say otherwise.
_YEARS_OF_DWPD = 5.0
# For a question to a file system, whose drive may be dead.
_PATIENCE_S = 5.0

_Answer = TypeVar("_Answer")


def default_ssd_dirs() -> tuple[str, ...]:
    if os.geteuid() == 0:
        return ("/var/cache/flexkv",)
    return (os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "flexkv"),)


def ssd_options(settings: Settings) -> dict[str, bool | int | float | str | list[str]]:
    return {
        "ssd_bytes": int(settings.ssd_cache_bytes),
        "ssd_directories": list(settings.ssd_cache_dir),
        # Not of one that was given: a drive that is not mounted there must be noticed.
        "ssd_make_parents": settings.origin("ssd_cache_dir") == "default",
        "ssd_strict": settings.ssd_strict,
        "ssd_admission": settings.ssd_admission,
        "ssd_dwpd": settings.ssd_dwpd,
        "ssd_capacity_bytes": int(settings.ssd_capacity_gb * 1e9),
        "ssd_tbw": settings.ssd_tbw,
        "ssd_years": settings.ssd_years or _YEARS_OF_DWPD,
        "ssd_direct_io": settings.ssd_direct_io,
        "always_load": settings.ssd_load_policy == "always",
    }


def too_large_for_drives(settings: Settings) -> list[str]:
    """A warning for each file system that cannot hold its part of ssd_cache_gb."""
    if settings.ssd_cache_bytes == 0:
        return []
    places: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for path in settings.ssd_cache_dir:
        place = _in_time(partial(_device_and_size, path))
        if place is None:
            continue  # the node says what is wrong there
        places.setdefault(place[0], []).append(path)
        sizes[place[0]] = place[1]
    share = settings.ssd_cache_bytes // len(settings.ssd_cache_dir)
    found = []
    for device, paths in places.items():
        held = sizes[device]
        if 0 < held < share * len(paths):
            found.append(
                f"ssd_cache_gb: {settings.show('ssd_cache_gb')} from {settings.origin('ssd_cache_gb')} means "
                f"{format_size(share * len(paths))} in {', '.join(paths)}, where the file system has {format_size(held)} "
                "in all: the cache ends where it is full"
            )
    return found


def _device_and_size(path: str) -> tuple[int, int] | None:
    try:
        device, system = os.stat(_existing(path)).st_dev, os.statvfs(_existing(path))
    except OSError:
        return None
    return device, system.f_blocks * system.f_frsize


def _in_time(call: Callable[[], _Answer]) -> _Answer | None:
    """What the call returns; None if it hangs, and then it is left behind."""
    answer: list[_Answer] = []
    thread = threading.Thread(target=lambda: answer.append(call()), daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    return answer[0] if answer else None


def _existing(path: str) -> str:
    """The directory, or the one above it in which it is going to be made."""
    while not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def ssd_problems(settings: Settings) -> list[str]:
    def wrong(key: str, why: str) -> str:
        return f"{key}: wrong value {settings.show(key)} from {settings.origin(key)}; {why}"

    found = []
    if settings.ssd_cache_bytes > 0 and not settings.ssd_cache_dir:
        found.append(wrong("ssd_cache_dir", "allowed: at least one directory when ssd_cache_gb is more than 0"))
    by_place: dict[str, str] = {}
    for path in settings.ssd_cache_dir:
        place = _in_time(partial(os.path.realpath, path)) or path
        first = by_place.setdefault(place, path)
        if first != path:
            found.append(wrong("ssd_cache_dir", f"{first} and {path} are the same directory"))
    return found + [wrong(*problem) for problem in _endurance_problems(settings)]


def _endurance_problems(settings: Settings) -> list[tuple[str, str]]:
    """The settings of the write budget that do not go together: key and what is allowed."""

    def has(key: str) -> str:
        return f"which is {settings.show(key)} ({settings.origin(key)})"

    found = []
    if settings.ssd_dwpd > 0 and settings.ssd_tbw > 0:
        found.append(("ssd_tbw", f"allowed: 0 beside ssd_dwpd, {has('ssd_dwpd')}; give one of them"))
    elif settings.ssd_tbw > 0 and settings.ssd_years == 0:
        found.append(("ssd_years", f"allowed: more than 0 with ssd_tbw, {has('ssd_tbw')}; it says how long they last"))
    if settings.ssd_dwpd == 0 and settings.ssd_tbw == 0 and settings.ssd_years > 0:
        found.append(("ssd_years", "allowed: 0 without ssd_dwpd or ssd_tbw; give one of them"))
    if settings.ssd_dwpd == 0 and settings.ssd_capacity_gb > 0:
        found.append(("ssd_capacity_gb", "allowed: 0 without ssd_dwpd; it says what that is a multiple of"))
    return found
