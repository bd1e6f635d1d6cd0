"""Host memory, what the system permits, and the directory in which processes meet."""

from __future__ import annotations

import json
import os
import re
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexkv.config import Settings
from flexkv.config.sizes import MIB, AutoSize, HostMemory, format_size, read_host_memory
from flexkv.doctor.finding import Finding, better, wrong
from flexkv.node_sockets import CannotRead, node_sockets
from flexkv.status_fields import mapping, number

_TRIAL_BYTES = 64 * MIB
_HUGE_PAGE = 2 * MIB
_CAP_IPC_LOCK = 14


def check_host(settings: Settings, core: Any | None) -> Iterator[Finding]:
    """`core`: flexkv._core, or None where it cannot be imported; what only it can tell is then left out."""
    held = bytes_held(core, settings.node_target.runtime_dir) if core is not None else 0
    yield room_for_pool(settings, read_host_memory(), held)
    if core is not None:
        yield pages(settings, core)
    yield file_size_limit(settings)
    if core is not None and settings.ssd_cache_bytes > 0:
        yield io_uring(core)
    yield locked_memory(settings)
    yield runtime_dir(settings)


def bytes_held(core: Any, directory: str) -> int:
    """Host memory of the pools of nodes that run already."""
    try:
        sockets = node_sockets(directory)
    except CannotRead:
        return 0
    held = 0
    for socket in sockets:
        try:
            held += int(number(mapping(json.loads(core.query_status(str(socket))), "pool"), "bytes") or 0)
        except (RuntimeError, OSError, ValueError):
            continue  # nobody is there
    return held


def room_for_pool(settings: Settings, memory: HostMemory, held: int) -> Finding:
    size = settings.cpu_cache_bytes
    asked = (
        f"{format_size(size)}{' (auto)' if isinstance(size, AutoSize) else ''} from {settings.origin('cpu_cache_gb')}"
    )
    found = f"cpu_cache_gb {asked}; {format_size(memory.available)} {memory.bound}"
    if held:
        found += f", {format_size(held)} held by nodes that run"
    if size <= memory.available + held:
        return Finding("host memory", found)
    if settings.origin("cpu_cache_gb") == "default":
        return better("host memory", found, "the node takes what fits; set FLEXKV_CPU_CACHE_GB, or auto")
    return wrong("host memory", found, "the node would not start: set FLEXKV_CPU_CACHE_GB to less, or to auto")


def pages(settings: Settings, core: Any, sys: Path = Path("/sys")) -> Finding:
    """Drives move up to twice as much, and GPUs pin in half the time, where the pool lies on pages of 2 MiB."""
    looked_at = "pages of the pool"
    try:
        found = core.trial_pool(_TRIAL_BYTES, settings.use_hugepage_cpu_buffer)
    except RuntimeError as error:
        return wrong(looked_at, str(error), "a pool is a memfd: allow memfd_create, mmap and fallocate to this process")
    wanted = -(-settings.cpu_cache_bytes // _HUGE_PAGE)
    reserve = f"reserve pages: sysctl vm.nr_hugepages={wanted} for {format_size(settings.cpu_cache_bytes)}"
    if settings.use_hugepage_cpu_buffer:
        free = _number_in(sys / "kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        found = f"{found}; {free:,} of {wanted:,} huge pages are free"
        return Finding(looked_at, found) if free >= wanted else better(looked_at, found, reserve)
    joined = re.search(r"(\d+) % joined", found)
    found += f" (tried with {format_size(_TRIAL_BYTES)})"
    if joined is not None and int(joined[1]) >= 90:
        return Finding(looked_at, found)
    return better(
        looked_at,
        found,
        f"Linux 6.1 with transparent huge pages joins them; or FLEXKV_USE_HUGEPAGE_CPU_BUFFER=1, and {reserve}",
    )


def file_size_limit(settings: Settings) -> Finding:
    """A pool is a file in memory, and a model has one file of blocks on each drive: the limit on files holds for both.
    No file system bounds a memfd, /dev/shm neither."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding("limit on files (ulimit -f)", "none")
    largest = max(settings.cpu_cache_bytes, settings.ssd_cache_bytes // max(len(settings.ssd_cache_dir), 1))
    found = f"{format_size(limit)}; the pool, or the share of a drive, has {format_size(largest)}"
    if limit >= largest:
        return Finding("limit on files (ulimit -f)", found)
    return wrong("limit on files (ulimit -f)", found, "start with ulimit -f unlimited (systemd: LimitFSIZE=infinity)")


def io_uring(core: Any, proc: Path = Path("/proc")) -> Finding:
    possible, found = core.io_uring()
    if possible:
        return Finding("io_uring", found)
    advice = "allow io_uring_setup, io_uring_enter and io_uring_register (container: in its seccomp profile)"
    if _number_in(proc / "sys/kernel/io_uring_disabled") > 0:
        advice = "sysctl kernel.io_uring_disabled=0"
    return better("io_uring", f"{found}; drives are read and written by threads instead", advice)


def locked_memory(settings: Settings, proc: Path = Path("/proc")) -> Finding:
    """io_uring counts the pool that it registers, once for each drive. CUDA's pinned memory is not counted."""
    looked_at = "locked memory (ulimit -l)"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = "unlimited" if limit == resource.RLIM_INFINITY else format_size(limit)
    if settings.ssd_cache_bytes == 0:
        return Finding(looked_at, f"{text}; only the SSD tier needs it, and there is none")
    if _has_capability(proc / "self/status", _CAP_IPC_LOCK):
        return Finding(looked_at, f"{text}; it does not hold for this process (CAP_IPC_LOCK)")
    wanted = settings.cpu_cache_bytes * max(len(settings.ssd_cache_dir), 1)
    found = f"{text}; {format_size(wanted)} to register the pool with each drive"
    if limit == resource.RLIM_INFINITY or limit >= wanted:
        return Finding(looked_at, found)
    return better(
        looked_at,
        f"{found}: the rest is not registered, and reads are slower",
        "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity; Docker: --ulimit memlock=-1)",
    )


def runtime_dir(settings: Settings) -> Finding:
    """The core's own rules, without making the directory."""
    looked_at = "runtime directory"
    path = settings.node_target.runtime_dir
    another = "set FLEXKV_RUNTIME_DIR to a directory of this user alone"
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        parent = os.path.dirname(path)
        if os.access(parent, os.W_OK | os.X_OK):
            return Finding(looked_at, f"{path} is not there yet; it can be made")
        return wrong(looked_at, f"{path} is not there, and {parent} cannot be written", another)
    except OSError as error:
        return wrong(looked_at, f"{path}: {error.strerror}", another)
    if not stat.S_ISDIR(info.st_mode):
        return wrong(looked_at, f"{path} is no directory (nor may it be a symbolic link)", another)
    mode = stat.S_IMODE(info.st_mode)
    if info.st_uid != os.geteuid():
        return wrong(looked_at, f"{path} belongs to uid {info.st_uid}, not to uid {os.geteuid()}", another)
    if mode & 0o077:
        return wrong(looked_at, f"{path} is open to group or others ({mode:04o})", f"chmod 700 {path}")
    if not os.access(path, os.W_OK | os.X_OK):
        return wrong(looked_at, f"{path} ({mode:04o}) cannot be written", f"chmod 700 {path}, or {another}")
    return Finding(looked_at, f"{path} is private ({mode:04o}) and can be written")


def _has_capability(status: Path, number: int) -> bool:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", _text_of(status), re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> number & 1)


def _number_in(path: Path) -> int:
    """0 where there is none."""
    text = _text_of(path).strip()
    return int(text) if text.isdecimal() else 0


def _text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
