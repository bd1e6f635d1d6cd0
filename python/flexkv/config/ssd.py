"""The SSD tier's settings together: the default directory, what contradicts what, what the core gets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexkv.config.settings import Settings


def default_ssd_dirs() -> tuple[str, ...]:
    if os.geteuid() == 0:
        return ("/var/cache/flexkv",)
    return (os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "flexkv"),)


def ssd_options(settings: Settings) -> dict[str, bool | int | float | str | list[str]]:
    return {
        "ssd_bytes": int(settings.ssd_cache_bytes),
        "ssd_directories": list(settings.ssd_cache_dir),
        "ssd_strict": settings.ssd_strict,
        "ssd_direct_io": settings.ssd_direct_io,
        "ssd_admission": settings.ssd_admission,
        "ssd_dwpd": settings.ssd_dwpd,
        "ssd_capacity_bytes": int(settings.ssd_capacity_bytes),
        "ssd_tbw": settings.ssd_tbw,
        "ssd_years": settings.ssd_years,
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
    # Who gives these believes that something is limited.
    if settings.origin("ssd_years") != "default" and not (settings.ssd_tbw or settings.ssd_dwpd):
        found.append(wrong("ssd_years", "allowed: only together with ssd_tbw or ssd_dwpd"))
    if settings.ssd_capacity_bytes and not settings.ssd_dwpd:
        found.append(wrong("ssd_capacity_gb", "allowed: only together with ssd_dwpd"))
    return found
