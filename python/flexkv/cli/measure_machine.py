"""What `flexkv doctor --measure` measures: copies to and from the GPU, the drives, GPUDirect Storage. What cannot be
measured is one line that says why."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from rich.text import Text

from flexkv.cli import bench_ssd, cells, run_bench, ssd_program
from flexkv.cli.bench_progress import BenchProgress
from flexkv.cli.common import console
from flexkv.config import Settings
from flexkv.config.sizes import format_size
from flexkv.doctor import copies, gds_measure, nvml

_NOTICEABLE = 1.05  # less than this is noise


def measure(settings: Settings) -> dict[str, Any]:
    directories = [path for path in settings.ssd_cache_dir if os.path.isdir(path)] if settings.ssd_cache_bytes else []
    gpu_steps = copies.STEPS if nvml.driver_is_there() else 0
    steps = gpu_steps + len(directories) + 1
    about = "copies and drives, up to a minute"
    with ssd_program.sigterm_as_interrupt(), BenchProgress("flexkv doctor --measure", about, steps) as progress:
        measured: dict[str, Any] = {"copies": _copies(progress), "drives": []}
        for path in directories:
            progress.say(path)
            measured["drives"].append({"directory": path} | _drive(path))
            progress.advance(path)
        progress.say("GPUDirect Storage")
        measured["gds"] = (
            {"directory": directories[0]} | gds_measure.compare(directories[0])
            if directories
            else {"error": "there is no directory of the SSD tier to read from (ssd_cache_gb, ssd_cache_dir)"}
        )
        progress.advance("GPUDirect Storage")
    return measured


def is_wrong(measured: dict[str, Any]) -> bool:
    return any(not row["equal"] for row in measured["copies"].get("rows", []))


def _copies(progress: BenchProgress) -> dict[str, Any]:
    if not nvml.driver_is_there():  # and torch takes seconds to say so
        return {"error": "there is no NVIDIA driver"}
    try:
        import torch
    except ImportError:
        return {"error": "torch is not installed in this environment, and the benchmark of copies needs it"}
    if not torch.cuda.is_available():
        return {"error": "torch finds no CUDA device"}
    rows: list[dict[str, Any]] = []
    report = {"device": torch.cuda.get_device_name(0), "tokens": copies.TOKENS, "rows": rows}
    try:
        progress.say("copies between GPU and host memory")
        for row in copies.measure_copies(torch.device("cuda:0"), copies.TOKENS, progress.advance):
            rows.append(dataclasses.asdict(row))
    except (RuntimeError, MemoryError, OSError, ImportError) as error:  # torch's out of memory is a RuntimeError
        report["error"] = _first_line(error)
    return report


def _drive(path: str) -> dict[str, Any]:
    if not run_bench.PROGRAM.exists():
        return {"error": "this installation has no benchmarks: it was built without libbenchmark-dev"}
    try:
        rows = bench_ssd.measure_shortly(path)
    except (ssd_program.BenchError, ssd_program.ProgramError, OSError) as error:
        return {"error": _first_line(error)}
    return {"rows": [{"op": row.op, "block_bytes": row.block, **row.medians()} for row in rows]}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- tables


def show(measured: dict[str, Any]) -> None:
    _show_copies(measured["copies"])
    _show_drives(measured["drives"])
    _show_gds(measured["gds"])


def _show_copies(report: dict[str, Any]) -> None:
    if rows := report.get("rows"):
        title = f"copies of {report['tokens']:,} tokens, {report['device']}"
        table = cells.table(title, "to host GB/s", "of the link", "to GPU GB/s", "of the link", "bytes equal")
        for row in rows:
            cells.add(
                table,
                row["what"],
                *(_gb(row["to_host"]), _ratio(row["of_link_to_host"])),
                *(_gb(row["to_device"]), _ratio(row["of_link_to_device"])),
                "yes" if row["equal"] else "NO",
            )
        console().print(Text(), table)
    if "error" in report:
        print(f"copies: not measured{' to the end' if report.get('rows') else ''}: {report['error']}")


def _show_drives(drives: list[dict[str, Any]]) -> None:
    if any("rows" in drive for drive in drives):
        table = cells.table("drives, at random", "FlexKV GB/s", "32 threads GB/s")
        for drive in drives:
            for row in drive.get("rows", []):
                what = f"{drive['directory']}: {row['op']} {format_size(row['block_bytes'])}"
                cells.add(table, what, f"{row['flexkv']:.2f}", f"{row['threads']:.2f}")
        console().print(Text(), table)
    for drive in drives:
        if "error" in drive:
            print(f"{drive['directory']}: not measured: {drive['error']}")


def _show_gds(report: dict[str, Any]) -> None:
    if "error" in report:
        print(f"GPUDirect Storage: not measured: {report['error']}")
        return
    table = cells.table(f"drive to GPU, {report['directory']}", "threads", "cuFile GB/s", "through host memory GB/s")
    for row in report["rows"]:
        what = f"read {format_size(row['block_bytes'])}"
        cells.add(table, what, str(row["threads"]), f"{row['cufile'] / 1e9:.2f}", f"{row['host'] / 1e9:.2f}")
    console().print(Text(), table)
    print(gds_verdict(report))


def gds_verdict(report: dict[str, Any]) -> str:
    """By the best that each of both reached."""
    cufile, host = (max(row[way] for row in report["rows"]) for way in ("cufile", "host"))
    begin = (
        f"GPUDirect Storage ({report['mode']}): {cufile / 1e9:.2f} GB/s at best, {host / 1e9:.2f} through host memory: "
    )
    if cufile > host * _NOTICEABLE:
        return f"{begin}{cufile / host:.2f} times as fast. FlexKV has no such path yet: please report these figures"
    return f"{begin}nothing to gain"


def _gb(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f}"


def _ratio(value: float | None) -> str:
    return cells.DASH if value is None else f"{value:.2f}"
