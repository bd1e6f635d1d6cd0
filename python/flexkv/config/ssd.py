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
        "ssd_admission": settings.ssd_admission,
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
    return found
