"""`flexkv bench ssd`: the drive path of the SSD tier in turns with fio and a loop of threads, on the same files."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from flexkv.cli.bench_progress import BenchProgress
from flexkv.cli.common import EXIT_FAILED, EXIT_USAGE, console, fail, print_json
from flexkv.cli.ssd_program import (
    DEPTH,
    FILE_BYTES_MIN,
    PATIENCE,
    BenchError,
    ProgramError,
    SsdProgram,
    sigterm_as_interrupt,
)
from flexkv.config.sizes import GIB, KIB, MIB, format_size, parse_size

FIO = "fio"
TARGET = 0.95  # of the best of the others
TARGET_FROM = 256 * KIB
_BLOCKS = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
_ROUND_SECONDS = 0.5
_ROUNDS_MIN = 3

_OURS = "flexkv"
_THREADS = "threads"
_FIO_WAYS: Mapping[str, tuple[str, ...]] = {
    "fio": (),
    "fio registered": ("--fixedbufs=1", "--registerfiles=1"),
}
# The pool lies on pages of 2 MiB where the kernel has some, and drives are faster with those: so does fio's memory.
_FIO_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass
class Row:
    op: str
    order: str
    block: int
    directories: int
    rates: dict[str, list[float]] = field(default_factory=dict)  # GB/s, by who, a round each
    errors: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.op} {self.order} {format_size(self.block)}"

    def medians(self) -> dict[str, float]:
        return {who: statistics.median(rates) for who, rates in self.rates.items() if rates}

    def ratio(self) -> float | None:
        medians = self.medians()
        best = max((rate for who, rate in medians.items() if who != _OURS), default=0.0)
        return medians[_OURS] / best if best > 0 and _OURS in medians else None

    def met(self) -> bool | None:
        ratio = self.ratio()
        return None if ratio is None or self.block < TARGET_FROM else ratio >= TARGET


def run(directories: list[str], size: str, seconds: float, as_json: bool) -> None:
    try:
        bytes_each = parse_size(size, GIB)
    except ValueError:
        fail(f"--size: '{size}' is not a size; write for example 2G", EXIT_USAGE)
    if bytes_each < FILE_BYTES_MIN:
        fail(f"--size: at least {format_size(FILE_BYTES_MIN)}", EXIT_USAGE)
    bytes_each -= bytes_each % max(_BLOCKS)
    _check_space(directories, bytes_each)
    notes: list[str] = []
    rows: list[Row] = []
    about: dict[str, Any] = {"load_average": [_load_average()]}
    try:
        with sigterm_as_interrupt(), SsdProgram(directories, bytes_each) as measuring:
            rows = _rows(len(directories))
            _measure(rows, measuring, about, notes, seconds)
    except (BenchError, ProgramError) as error:
        fail(error)
    about["load_average"].append(_load_average())
    if as_json:
        print_json(_report(rows, about, notes))
    else:
        _show(rows, about, notes)
    if any(row.errors for row in rows):
        raise typer.Exit(EXIT_FAILED)


def measure_shortly(directory: str) -> list[Row]:
    """Reads and writes of the largest blocks in a file of 256 MiB: ours and the threads'. A second or two. Raises
    BenchError or ProgramError."""
    rows = [Row(op, "random", max(_BLOCKS), 1, {_OURS: [], _THREADS: []}) for op in ("read", "write")]
    with sigterm_as_interrupt(), SsdProgram([directory], FILE_BYTES_MIN) as measuring:
        measuring.fill()
        for row, turn in itertools.product(rows, range(2)):
            for who, rates in row.rates.items():
                rates.append(_rate_of(who, row, measuring, _ROUND_SECONDS / 2, turn))
    return rows


def _check_space(directories: list[str], bytes_each: int) -> None:
    """All directories together: several may be on one file system. The program leaves a reserve on top of it."""
    wanted: dict[int, int] = {}
    for directory in directories:
        device = os.stat(directory).st_dev
        wanted[device] = wanted.get(device, 0) + bytes_each
        free = shutil.disk_usage(directory).free
        if free < wanted[device]:
            fail(
                f"{directory}: {format_size(wanted[device])} of free space are needed, {format_size(free)} are there; "
                "give a smaller --size"
            )


def _load_average() -> float:
    return round(os.getloadavg()[0], 2)


def _rows(directories: int) -> list[Row]:
    """Reads first: they are compared with what the files were filled with, and fio writes what it likes."""
    counts = (1,) if directories == 1 else (1, directories)
    return [
        Row(op, order, block, count)
        for op, count, order, block in itertools.product(("read", "write"), counts, ("sequential", "random"), _BLOCKS)
    ]


def _measure(
    rows: list[Row], measuring: SsdProgram, about: dict[str, Any], notes: list[str], seconds: float
) -> None:
    rounds = max(round(seconds / _ROUND_SECONDS), _ROUNDS_MIN)
    # flexkv, the threads and the two ways of fio take turns.
    minutes = len(rows) * seconds * (2 + len(_FIO_WAYS)) / 60
    what = f"{len(rows)} figures, about {max(round(minutes), 1)} min beside filling the files"
    with BenchProgress("flexkv bench ssd", what) as bar:
        bar.say("filling the files")
        about |= measuring.fill()
        who = [_OURS, _THREADS, *_fio_ways(measuring, notes)]
        bar.expect(len(rows) * rounds * len(who))
        for row in rows:
            row.rates = {each: [] for each in who}
            for turn in range(rounds):
                first = turn % len(who)
                for each in who[first:] + who[:first]:
                    bar.say(f"{row.name}: {each}")
                    try:
                        row.rates[each].append(_rate_of(each, row, measuring, seconds / rounds, turn))
                    except BenchError as error:
                        row.errors.append(f"{each}: {error}")
                    bar.advance(f"{row.name}: {each}")


def _rate_of(who: str, row: Row, measuring: SsdProgram, seconds: float, seed: int) -> float:
    if who in _FIO_WAYS:
        return _fio(who, row, measuring.files[: row.directories], measuring.bytes_each, seconds, seed)
    way = {_OURS: "drive", _THREADS: "threads"}[who]
    return measuring.measure(way, row.op, row.order, row.block, seconds, seed, row.directories)


def _fio_ways(measuring: SsdProgram, notes: list[str]) -> list[str]:
    """What fio can do here: it may be missing, and registering memory may be forbidden (ulimit -l)."""
    if shutil.which(FIO) is None:
        notes.append("fio not found: without it only flexkv and the threads are measured (Debian: apt install fio)")
        return []
    ways = []
    for way in _FIO_WAYS:
        try:
            _rate_of(way, Row("read", "random", max(_BLOCKS), 1), measuring, 0.05, 0)
            ways.append(way)
        except BenchError as error:
            notes.append(f"{way} left out: {error}")
    return ways


def _fio(way: str, row: Row, files: list[str], bytes_each: int, seconds: float, seed: int) -> float:
    """GB/s of one run: a job for each file, all at once."""
    command = [
        FIO,
        *("--output-format=json", "--ioengine=io_uring", "--direct=1", f"--iodepth={DEPTH}", f"--bs={row.block}"),
        *(f"--rw={'rand' if row.order == 'random' else ''}{row.op}", f"--size={bytes_each}", f"--randseed={seed + 1}"),
        *("--time_based", f"--runtime={max(round(seconds * 1000), 1)}ms", "--allow_file_create=0", *_FIO_WAYS[way]),
        *itertools.chain.from_iterable((f"--name=job{i}", f"--filename={file}") for i, file in enumerate(files)),
    ]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds + PATIENCE,
        env=os.environ | _FIO_ENVIRONMENT,
    )
    messages = " / ".join(line for line in (done.stderr or "").splitlines() if line.strip())
    try:
        # In front of the JSON fio may write what it wants to be known.
        jobs = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    except (ValueError, KeyError):
        raise BenchError(f"fio ended with code {done.returncode}: {messages}") from None
    failed = [job for job in jobs if job["error"] != 0 or job.get("total_err", 0) != 0]
    if done.returncode != 0 or failed or len(jobs) != len(files):
        codes = ", ".join(os.strerror(abs(job["error"])) for job in failed)
        raise BenchError(f"fio failed with code {done.returncode}: {codes or messages}")
    moved = sum(job[row.op]["io_bytes"] for job in jobs)
    took = max(job[row.op]["runtime"] for job in jobs) / 1000
    if moved == 0 or took <= 0:
        raise BenchError("fio moved nothing")
    return float(moved / took / 1e9)


def _report(rows: list[Row], about: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    return {
        "suite": "ssd",
        "context": about | {"depth": DEPTH, "time": int(time.time())},
        "notes": notes,
        "benchmarks": [
            {
                **{"op": row.op, "order": row.order, "block_bytes": row.block, "directories": row.directories},
                **{"gigabytes_per_second": row.rates, "medians": row.medians(), "errors": row.errors},
                **{"ratio_to_best": row.ratio(), "target": TARGET if row.block >= TARGET_FROM else None},
                "met": row.met(),
            }
            for row in rows
        ],
    }


def _show(rows: list[Row], about: dict[str, Any], notes: list[str]) -> None:
    out = console()
    for count in dict.fromkeys(row.directories for row in rows):
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("1 directory" if count == 1 else f"{count} directories")
        shown = [row for row in rows if row.directories == count]
        who = list(dict.fromkeys(each for row in shown for each in row.rates))
        for each in who:
            table.add_column(each, justify="right")
        table.add_column(f"of the best (>= {TARGET:g})", justify="right")
        for row in shown:
            # Text, not str: a message may hold what Rich would take for markup.
            name = Text.assemble(row.name, *((f"  {error}", "red") for error in dict.fromkeys(row.errors)))
            table.add_row(name, *(_rate(row.rates.get(each, [])) for each in who), _ratio(row))
        out.print(table, Text())
    for note in notes:
        print(f"Note: {note}")
    for drive in about.get("drives", []):
        print(f"Drive: {drive}")
    print(f"Memory: {about.get('memory', '?')}. Load average before and after: {about['load_average']}")
    print(f"GB/s, median (least-most) of the rounds, which take turns; {DEPTH} blocks under way for all.")
    judged = [row.met() for row in rows if row.met() is not None]
    if judged:
        print(f"{sum(map(bool, judged))} of {len(judged)} targets met (blocks of {format_size(TARGET_FROM)} and more)")


def _rate(rates: list[float]) -> Text:
    if not rates:
        return Text("-", style="dim")
    return Text(f"{statistics.median(rates):.2f} ({min(rates):.2f}-{max(rates):.2f})")


def _ratio(row: Row) -> Text:
    ratio, met = row.ratio(), row.met()
    if ratio is None:
        return Text("-", style="dim")
    return Text(f"{ratio:.2f}", style="" if met is None else "green" if met else "red")
