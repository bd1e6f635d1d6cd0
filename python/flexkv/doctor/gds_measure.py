"""Reads of a file into GPU memory by cuFile and through pinned host memory, in turns, in a process of its own:
`python -m flexkv.doctor.gds_measure DIRECTORY`, whose last line is JSON. A foreign library that crashes, prints or
hangs then costs one line of the report, and what it writes lies in a folder that goes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import json
import mmap
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexkv.config.sizes import MIB
from flexkv.doctor.cuda_driver import CudaDriver, CudaError
from flexkv.doctor.cufile import CuFile, CuFileError, load_library

_UNIT = MIB  # of the pattern: each begins with its number
_FILE_BYTES = 512 * MIB
_BLOCKS = (MIB, 4 * MIB)
_THREADS = (1, 16)
_ROUNDS = 3
_ROUND_SECONDS = 0.25
_PATIENCE = 60.0
_COMPAT_MARKS = ("compat mode", "compatible mode")  # in cuFile's log


def compare(directory: str) -> dict[str, Any]:
    """{"device", "mode", "rows": [{"block_bytes", "threads", "cufile", "host"}]} with rates in bytes per second, or
    {"error"}: one line. Makes a file of 512 MiB in the directory, and removes it."""
    try:
        with tempfile.TemporaryDirectory(prefix="flexkv-doctor-", dir=directory) as folder:
            return _in_child(folder)
    except OSError as error:
        return {"error": f"{directory}: {error.strerror or error}"}


def _in_child(folder: str) -> dict[str, Any]:
    log = Path(folder, "cufile.log")
    environment = os.environ | {"CUFILE_LOGFILE_PATH": str(log), "CUFILE_LOGGING_LEVEL": "NOTICE"}
    environment.setdefault("CUFILE_ALLOW_COMPAT_MODE", "true")
    package = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flexkv.doctor.gds_measure", folder],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            cwd=folder,  # where an older cuFile puts its log
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_PATIENCE:g} s"}
    written = log.read_text(errors="replace") if log.exists() else ""
    try:
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        how = f"code {done.returncode}" if done.returncode >= 0 else signal.strsignal(-done.returncode)
        return {"error": f"the measuring process ended with {how}: {last}{_first_error(written)}"}
    if "error" in report:
        report["error"] += _first_error(written)
    else:
        direct = not any(mark in written for mark in _COMPAT_MARKS)
        report["mode"] = "direct" if direct else "compatibility mode, which copies through host memory itself"
    return report


def _first_error(log: str) -> str:
    """What cuFile itself says; what comes after the first follows from it."""
    lines = [line.partition(" ERROR ")[2].strip() for line in log.splitlines() if " ERROR " in line]
    return f" [cufile.log: {lines[0]}]" if lines else ""


# ---- in the process of its own


def _measure(folder: str) -> dict[str, Any]:
    _, library = load_library()
    cuda = CudaDriver()
    path = os.path.join(folder, "data")
    pattern = os.urandom(_UNIT)
    _write(path, pattern)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    memory_bytes = max(_BLOCKS) * max(_THREADS)
    device, host = cuda.device_memory(memory_bytes), cuda.pinned_memory(memory_bytes)
    views = memoryview((ctypes.c_char * memory_bytes).from_address(host))
    streams = [cuda.stream() for _ in range(max(_THREADS))]

    def through_host(thread: int, offset: int, count: int) -> None:
        begin = thread * max(_BLOCKS)
        done = os.preadv(descriptor, [views[begin : begin + count]], offset)
        if done != count:
            raise OSError(0, f"read {done} of {count} bytes")
        cuda.copy_to_device(device + begin, host + begin, count, streams[thread])

    with contextlib.closing(CuFile(library, descriptor, device, memory_bytes)) as cufile:

        def by_cufile(thread: int, offset: int, count: int) -> None:
            cufile.read(count, offset, thread * max(_BLOCKS))

        def verified(read: Callable[[int, int, int], None], count: int, threads: int, seed: int) -> float:
            rate, last = _rate(cuda, read, count, threads, seed)
            for thread, offset in enumerate(last):
                if cuda.read_device(device + thread * max(_BLOCKS), count) != _expected(pattern, offset, count):
                    raise CuFileError(f"{read.__name__}: wrong bytes at offset {offset}")
            return rate

        rows = []
        for count in _BLOCKS:
            for threads in _THREADS:
                rates: dict[Callable[[int, int, int], None], list[float]] = {by_cufile: [], through_host: []}
                for turn in range(_ROUNDS):
                    for read in list(rates)[:: -1 if turn % 2 else 1]:
                        rates[read].append(verified(read, count, threads, turn))
                rows.append(
                    {
                        **{"block_bytes": count, "threads": threads},
                        **{"cufile": statistics.median(rates[by_cufile])},
                        **{"host": statistics.median(rates[through_host])},
                    }
                )
    os.close(descriptor)
    return {"device": cuda.device_name, "rows": rows}


def _write(path: str, pattern: bytes) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT, 0o600)
    try:
        with mmap.mmap(-1, max(_BLOCKS)) as buffer:  # aligned
            for at in range(0, _FILE_BYTES, len(buffer)):
                buffer[:] = _expected(pattern, at, len(buffer))
                if os.pwrite(descriptor, buffer, at) != len(buffer):
                    raise OSError(0, "the drive is full")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _expected(pattern: bytes, offset: int, count: int) -> bytes:
    first = offset // _UNIT
    return b"".join(number.to_bytes(8, "little") + pattern[8:] for number in range(first, first + count // _UNIT))


def _rate(
    cuda: CudaDriver, read: Callable[[int, int, int], None], count: int, threads: int, seed: int
) -> tuple[float, list[int]]:
    """Bytes per second at random over the file, and the offset that each thread read last."""
    offsets = list(range(0, _FILE_BYTES, count))
    random.Random(seed).shuffle(offsets)
    begin = time.monotonic()

    def work(thread: int) -> tuple[int, int]:
        cuda.use_in_this_thread()
        own = offsets[thread::threads]
        done = 0
        while True:
            read(thread, own[done % len(own)], count)
            done += 1
            if time.monotonic() - begin >= _ROUND_SECONDS:
                return done, own[(done - 1) % len(own)]

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(work, range(threads)))
    seconds = time.monotonic() - begin
    return sum(done for done, _ in results) * count / seconds, [last for _, last in results]


def main() -> None:
    try:
        report = _measure(sys.argv[1])
    except (CuFileError, CudaError) as error:
        report = {"error": str(error)}
    except OSError as error:
        report = {"error": error.strerror or str(error)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
