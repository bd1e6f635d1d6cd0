"""Sizes as people write them, and how much host memory the cache may take when they write `auto`.

GB means GiB here, as in the original and in every peer's settings; `16`, `16GB`, `16g` and `16GiB` are the same size.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
PIB = 1 << 50

_UNITS = {"b": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "p": PIB}
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([kmgtp]?(?:i?b)?)", re.ASCII | re.IGNORECASE)

# Left to the engine, its weights on their way to the GPU and the operating system, when `auto` chooses.
_RESERVE = 10 * GIB
_AUTO_SHARE = 0.8


class AutoSize(int):
    """A size in bytes that this machine's memory decided, and the sentence that explains it."""

    reason: str

    def __new__(cls, value: int, reason: str) -> Self:
        size = super().__new__(cls, value)
        size.reason = reason
        return size


def parse_size(value: object, bare_unit: int) -> int:
    """Bytes in `value`; a number without a unit counts `bare_unit` bytes. ValueError if it is no size."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value * bare_unit
    if isinstance(value, float):
        if not math.isfinite(value * bare_unit):
            raise ValueError("not a size")
        return int(value * bare_unit)
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a size")
    number, unit = match.groups()
    scale = _UNITS[unit[0].lower()] if unit else bare_unit
    return int(float(number) * scale) if "." in number else int(number) * scale


def format_size(size: int) -> str:
    """The size in the largest unit that keeps it readable, e.g. `16 GiB`, `1.5 TiB`, `0 B`."""
    for unit, scale in (("PiB", PIB), ("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= scale:
            return f"{size / scale:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{size} B"


@dataclass(frozen=True)
class HostMemory:
    """What this process may still take, in bytes, and which limit said so."""

    available: int
    bound: str


def read_host_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """Available memory of the machine, bounded by the memory limits (v1 and v2) of the control groups we are in."""
    memory = HostMemory(_meminfo_available(proc / "meminfo"), "available on the machine")
    for group in _memory_groups(proc / "self" / "cgroup", cgroup):
        room = _cgroup_room(group)
        if room is not None and room < memory.available:
            memory = HostMemory(room, f"left under the control group's limit ({group})")
    return memory


def auto_cache_size(memory: HostMemory) -> AutoSize:
    """0.8 of what is left after a reserve: 10 GiB, or half where there is little. Whole GiB, at least one."""
    reserve = min(_RESERVE, memory.available // 2)
    size = max(int((memory.available - reserve) * _AUTO_SHARE) // GIB, 1) * GIB
    return AutoSize(
        size,
        f"auto: {_AUTO_SHARE} x ({format_size(memory.available)} {memory.bound} - {format_size(reserve)} reserve), "
        "in whole GiB, at least 1 GiB",
    )


def fitting_cache_size(memory: HostMemory) -> int:
    """What `auto` gives, and less than its least where there is not even twice that."""
    return min(int(auto_cache_size(memory)), memory.available // 2 // MIB * MIB)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _meminfo_available(path: Path) -> int:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read_text(path), re.MULTILINE)
    return int(match[1]) * KIB if match else 0


def _memory_groups(membership: Path, root: Path) -> list[Path]:
    """Folders whose limits hold for this process: its own memory group and all groups above it."""
    groups: list[Path] = []
    for line in _read_text(membership).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            top = root
        elif "memory" in controllers.split(","):
            top = root / "memory"
        else:
            continue
        # Inside a container the path may be the one outside: then only the top folder exists, and it is our own.
        own = top / path.lstrip("/")
        groups += [own, *(parent for parent in own.parents if parent.is_relative_to(top))]
    return groups


def _cgroup_room(group: Path) -> int | None:
    for limit_file, usage_file, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = _read_text(group / limit_file).strip()
        if limit.isdecimal():
            usage = _read_text(group / usage_file).strip()
            # The kernel drops inactive file pages before it kills anybody, so they count as room.
            cache = re.search(rf"^{cache_key} (\d+)$", _read_text(group / "memory.stat"), re.MULTILINE)
            used = int(usage) - (int(cache[1]) if cache else 0) if usage.isdecimal() else 0
            return max(int(limit) - max(used, 0), 0)
    return None
