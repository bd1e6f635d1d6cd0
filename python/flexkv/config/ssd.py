"""The SSD tier's settings together: the default directory, what contradicts what, what the core gets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexkv.config.settings import Settings


# What data sheets give drive writes per day for, unless they say otherwise.
_YEARS_OF_DWPD = 5.0


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


def ssd_problems(settings: Settings) -> list[str]:
    def wrong(key: str, why: str) -> str:
        return f"{key}: wrong value {settings.show(key)} from {settings.origin(key)}; {why}"

    found = []
    if settings.ssd_cache_bytes > 0 and not settings.ssd_cache_dir:
        found.append(wrong("ssd_cache_dir", "allowed: at least one directory when ssd_cache_gb is more than 0"))
    real = {os.path.realpath(path) for path in settings.ssd_cache_dir}
    if len(real) < len(settings.ssd_cache_dir):
        found.append(wrong("ssd_cache_dir", "allowed: directories that differ; two of these are links to the same"))
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
