"""The directories of the SSD tier and the drives below them. Nothing of it is made or changed."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexkv.config import Settings
from flexkv.config.sizes import GIB, format_size
from flexkv.config.ssd import without_size
from flexkv.doctor.finding import Finding, better, wrong

_PAGE = 4096
_MADE_FOR = ("ext4", "xfs")
_IN_MEMORY = ("tmpfs", "ramfs")
_KEPT_FREE = 0.01  # of a file system, at most a GiB: what the node leaves to others


@dataclass(frozen=True)
class Mount:
    """Where a directory lies."""

    file_system: str  # ext4, xfs, overlay, ...
    device: str  # the whole drive where the kernel tells it (nvme0n1), else what is mounted
    options: str = ""


def check_drives(settings: Settings) -> Iterator[Finding]:
    if problems := without_size(settings):
        yield wrong("SSD tier", problems[0], "set both, or neither")
        return
    if settings.ssd_cache_bytes == 0:
        yield Finding("SSD tier", "none (ssd_cache_gb is 0)")
        return
    may_make_parents = settings.origin("ssd_cache_dir") == "default"
    there = []
    for path in settings.ssd_cache_dir:
        found = directory(path, may_make_parents)
        yield found
        if os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK):
            there.append(path)
            yield file_system(path, mount_of(path), settings.ssd_direct_io)
    yield from space(settings, there)
    yield from shared_devices({path: mount_of(path) for path in there})


def directory(path: str, may_make_parents: bool) -> Finding:
    """The core's own rules for a directory that it trusts."""
    looked_at = f"SSD directory {path}"
    try:
        info = os.stat(path)
    except FileNotFoundError:
        above = _existing_parent(path)
        if above != os.path.dirname(path) and not may_make_parents:
            return wrong(looked_at, f"{os.path.dirname(path)} is not there", "mount the drive, or make that directory")
        if not os.access(above, os.W_OK | os.X_OK):
            return wrong(
                looked_at, f"not there, and {above} cannot be written", f"make {path} for this user, mode 0700"
            )
        return Finding(looked_at, "not there yet; the node makes it (0700)")
    except OSError as error:
        return wrong(looked_at, error.strerror or str(error), "set FLEXKV_SSD_CACHE_DIR to a directory that is there")
    mode = stat.S_IMODE(info.st_mode)
    if not stat.S_ISDIR(info.st_mode):
        return wrong(looked_at, "no directory", "set FLEXKV_SSD_CACHE_DIR to a directory")
    if info.st_uid != os.geteuid():
        return wrong(
            looked_at, f"belongs to uid {info.st_uid}, not to uid {os.geteuid()}", f"chown {os.geteuid()} {path}"
        )
    if mode & 0o022:
        ours = os.path.exists(os.path.join(path, "node.secret"))  # the mode of other directories is not ours to change
        advice = f"chmod go-w {path}" if ours else f"set FLEXKV_SSD_CACHE_DIR to one of its own below it, {path}/flexkv"
        return wrong(looked_at, f"can be written by others ({mode:04o})", advice)
    if not os.access(path, os.W_OK | os.X_OK):
        return wrong(
            looked_at, f"cannot be written ({mode:04o}, or mounted read-only)", f"chmod 700 {path}, or remount"
        )
    if mode & 0o077:
        return better(looked_at, f"can be read by others ({mode:04o}): blocks are not encrypted", f"chmod 700 {path}")
    return Finding(looked_at, f"ours, writable, {mode:04o}")


def file_system(path: str, mount: Mount, wants_direct: bool) -> Finding:
    looked_at = f"file system of {path}"
    found = f"{mount.file_system} on {mount.device}"
    if mount.file_system in _IN_MEMORY:
        return better(
            looked_at, f"{found}: it is host memory itself", "a directory on a drive; more host memory: cpu_cache_gb"
        )
    if mount.file_system == "overlay":
        return better(looked_at, f"{found}: it ends with the container", "mount a drive into the container")
    refusal = direct_io_refusal(path)
    if wants_direct and refusal:
        return better(
            looked_at,
            f"{found}; O_DIRECT is refused ({refusal}): through the page cache",
            f"a directory on {' or '.join(_MADE_FOR)}",
        )
    found += "" if refusal else ", O_DIRECT works"
    if mount.file_system not in _MADE_FOR:
        return better(looked_at, found, f"the SSD tier is made for {' and '.join(_MADE_FOR)}")
    return Finding(looked_at, found)


def direct_io_refusal(path: str) -> str:
    """Why a page cannot be written and read past the page cache there; empty if it can. Leaves nothing behind."""
    try:
        with tempfile.TemporaryFile(dir=path, buffering=0) as file, mmap.mmap(-1, _PAGE) as page:  # aligned
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
            os.pwrite(file.fileno(), page, 0)
            os.preadv(file.fileno(), [page], 0)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def space(settings: Settings, paths: list[str]) -> Iterator[Finding]:
    """A line for each file system: what is free there and what our files have, beside the share of its directories."""
    by_system: dict[int, list[str]] = {}
    for path in paths:
        by_system.setdefault(os.stat(path).st_dev, []).append(path)
    share = settings.ssd_cache_bytes // len(settings.ssd_cache_dir)
    for together in by_system.values():
        info = os.statvfs(together[0])
        ours = sum(_bytes_of_blocks(path) for path in together)
        kept_free = min(int(info.f_blocks * info.f_frsize * _KEPT_FREE), GIB)
        room = max(info.f_bavail * info.f_frsize - kept_free, 0) + ours
        wanted = share * len(together)
        looked_at = f"space in {', '.join(together)}"
        found = f"{format_size(wanted)} wanted, room for {format_size(room)}"
        found += f" ({format_size(ours)} of them in use by the cache)" if ours else ""
        if room >= wanted:
            yield Finding(looked_at, found)
        else:
            whole = room * len(settings.ssd_cache_dir) // len(together)
            yield better(
                looked_at,
                f"{found}: the cache ends where the file system is full",
                f"free some, or FLEXKV_SSD_CACHE_GB={whole // GIB}" if whole >= GIB else "free some",
            )


def shared_devices(mounts: dict[str, Mount]) -> Iterator[Finding]:
    by_device: dict[str, list[str]] = {}
    for path, mount in mounts.items():
        by_device.setdefault(mount.device, []).append(path)
    for device, paths in by_device.items():
        if len(paths) > 1:
            yield better(
                f"directories on {device}",
                f"{len(paths)}: {', '.join(paths)}",
                "one directory for each drive: two on one gain nothing",
            )


def mount_of(path: str, mountinfo: Path = Path("/proc/self/mountinfo"), sys: Path = Path("/sys")) -> Mount:
    """By the longest mount point above the directory; of several mounts there, the last one hides the others."""
    real = os.path.realpath(path)
    best, length = Mount("unknown file system", "an unknown device"), -1
    for line in mountinfo.read_text(errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        number, point, options = (left.split()[index] for index in (2, 4, 5))
        kind, source, more = (*right.split(), "", "", "")[:3]
        point = _unescape(point)
        above = real == point or real.startswith(point.rstrip("/") + "/")
        if above and len(point) >= length:
            best, length = Mount(kind, _whole_drive(number, sys) or source, f"{options},{more}"), len(point)
    return best


def _whole_drive(number: str, sys: Path) -> str:
    """`nvme0n1` for any partition of it; empty for what is no block device."""
    device = sys / "dev/block" / number
    if not device.exists():
        return ""
    place = device.resolve()
    return (place.parent if (place / "partition").exists() else place).name


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _bytes_of_blocks(path: str) -> int:
    total = 0
    for entry in os.scandir(path):
        if entry.name.endswith((".blocks", ".records")) and entry.is_file(follow_symlinks=False):
            total += entry.stat().st_blocks * 512
    return total


def _existing_parent(path: str) -> str:
    above = os.path.dirname(path)
    while above != os.path.dirname(above) and not os.path.isdir(above):
        above = os.path.dirname(above)
    return above
