"""`flexkv bench transfer --ssd DIR`: what flexkv.bench.drives measures, with the drives' own rate, as a table."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from typing import Any

from rich.table import Table

from flexkv.cli.bench_progress import BenchProgress
from flexkv.cli.common import console, fail
from flexkv.cli.ssd_program import BLOCK_BYTES_MAX, DEPTH, BenchError, ProgramError, SsdProgram, sigterm_as_interrupt
from flexkv.config.sizes import GIB

TARGET = 0.9  # of the slower of link and drive
GEOMETRIES = ("mha16", "mla16")
LAYOUTS = ("apart",)
_FILE_BYTES = GIB  # of the program, in each directory
_DRIVE_SECONDS = 0.5


def measure(device: Any, geometries: list[str], layouts: list[str], directories: list[str]) -> dict[str, Any]:
    try:
        with (
            BenchProgress("flexkv bench transfer --ssd", "fills files, then loads from them; minutes") as progress,
            sigterm_as_interrupt(),
            SsdProgram(directories, _FILE_BYTES) as program,
        ):
            progress.say("filling files")
            about = program.fill()
            rows = []
            for geometry in geometries or GEOMETRIES:
                for layout in layouts or LAYOUTS:
                    rows += _rows(device, geometry, layout, directories, program, progress)
    except (BenchError, ProgramError, RuntimeError) as error:
        fail(error)
    return {"drives": about["drives"], "from_drives": rows}


def _rows(
    device: Any, geometry_name: str, layout: str, directories: list[str], program: SsdProgram, progress: BenchProgress
) -> list[dict[str, Any]]:
    from flexkv.bench.drives import measure_from_drives, slot_bytes
    from flexkv.bench.geometry import GEOMETRIES as ALL
    from flexkv.config import load

    geometry = ALL[geometry_name]
    stage_below = load().gpu_stage_below_bytes
    block = min(slot_bytes(geometry), BLOCK_BYTES_MAX)

    def drive_rate(size: int, turn: int) -> float:
        used = min(len(directories), max(size // slot_bytes(geometry), 1))
        under_way = min(-(-size // (block * used)), DEPTH)
        progress.say(f"{geometry_name} {layout} {size >> 20} MiB")
        return program.measure("drive", "read", "sequential", block, _DRIVE_SECONDS, turn, used, under_way)

    with contextlib.ExitStack() as stack:
        progress.say(f"{geometry_name} {layout}: writing")
        places = [
            stack.enter_context(tempfile.TemporaryDirectory(prefix="flexkv-bench-", dir=directory))
            for directory in directories
        ]
        rows = list(measure_from_drives(geometry, layout, device, places, stage_below, drive_rate))
    return [dataclasses.asdict(row) | {"overlaps": row.overlaps} for row in rows]


def show(report: dict[str, Any]) -> None:
    print(f"{report['device']}, blocks on drives only")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("blocks", "layout"):
        table.add_column(column)
    for column in ("MiB", "load GB/s", "drive", "link", f"of the slower (>= {TARGET:g})", "first copied", "last read"):
        table.add_column(column, justify="right")
    table.add_column("bytes equal")
    for row in report["from_drives"]:
        color = "green" if row["ratio"] >= TARGET else "red"
        table.add_row(
            *(row["geometry"], row["layout"], f"{row['bytes'] / 2**20:.1f}"),
            *(f"{row[rate] / 1e9:.2f}" for rate in ("load", "drive", "link")),
            f"[{color}]{row['ratio']:.2f}[/{color}]",
            *(f"{row[time] * 1e3:,.1f} ms" for time in ("first_copied_seconds", "last_read_seconds")),
            "yes" if row["equal"] else "[red]NO[/red]",
        )
    console().print(table)
    for drive in report["drives"]:
        print(f"Drive: {drive}")
