"""`flexkv bench transfer`: what flexkv.bench.transfer measures, as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

import typer
from rich.table import Table

from flexkv.cli import bench_from_drives
from flexkv.cli.bench_progress import BenchProgress
from flexkv.cli.common import EXIT_FAILED, EXIT_USAGE, console, fail, print_json


def run(
    device_name: str, geometries: list[str], layouts: list[str], tokens: list[int], ssd: list[str], as_json: bool
) -> None:
    """With `ssd`, directories on drives: loads from there instead of transfers to and from host memory."""
    try:
        import torch
    except ImportError:
        fail("torch is not installed in this environment: the benchmark needs it for device memory")
    from flexkv.bench.geometry import GEOMETRIES, LAYOUTS
    from flexkv.bench.transfer import TOKENS

    cuda = torch.cuda.is_available() if device_name == "auto" else device_name.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        fail(f"--device {device_name}: torch finds no CUDA device here; --device host measures this machine's memory")
    device = torch.device("cpu" if not cuda else "cuda:0" if device_name in ("auto", "cuda") else device_name)
    for name, given, allowed in (("geometry", geometries, GEOMETRIES), ("layout", layouts, LAYOUTS)):
        if unknown := [value for value in given if value not in allowed]:
            fail(f"--{name} {unknown[0]}: allowed are {', '.join(allowed)}", EXIT_USAGE)
    if wrong := [count for count in tokens if count < 1]:
        fail(f"--tokens {wrong[0]}: must be at least 1", EXIT_USAGE)
    if ssd and tokens:
        fail("--tokens does not go with --ssd, which has lengths of its own: from one block to 768 MiB", EXIT_USAGE)
    if cuda:
        torch.cuda.set_device(device)
    if ssd:
        report = bench_from_drives.measure(device, geometries, layouts, ssd)
    else:
        report = _measure(device, geometries or list(GEOMETRIES), layouts or list(LAYOUTS), tokens or list(TOKENS))
    report["device"] = torch.cuda.get_device_name(device) if cuda else "host memory"
    if as_json:
        print_json(report)
    else:
        (bench_from_drives.show if ssd else _show)(report)
    if not all(row["equal"] for row in report["from_drives" if ssd else "alone"]):
        raise typer.Exit(EXIT_FAILED)


def _measure(device: Any, geometries: list[str], layouts: list[str], tokens: list[int]) -> dict[str, Any]:
    from flexkv.bench.geometry import GEOMETRIES
    from flexkv.bench.transfer import measure_alone, measure_beside, measure_link
    from flexkv.config import load

    stage_below = load().gpu_stage_below_bytes
    count = len(geometries) * len(layouts) * len(tokens)
    about = f"{count} kinds of transfer, minutes for all; fewer with --geometry, --layout and --tokens"
    with BenchProgress("flexkv bench transfer", about) as progress:
        progress.say("plain copies")
        link = measure_link(device)
        alone = list(measure_alone(device, geometries, layouts, tokens, stage_below, progress.say))
        beside = []
        if device.type == "cuda":
            for compute in ("gemm", "reader"):
                progress.say(f"beside work of the GPU: {compute}")
                beside += measure_beside(device, GEOMETRIES[geometries[0]], layouts[0], stage_below, compute)
    return {
        "gpu_stage_below_bytes": stage_below,
        "link": dataclasses.asdict(link),
        "alone": [dataclasses.asdict(row) for row in alone],
        "beside": [dataclasses.asdict(row) for row in beside],
    }


def _show(report: dict[str, Any]) -> None:
    link = report["link"]
    print(f"{report['device']}: plain copies {_gb(link['to_host'])} GB/s to host, {_gb(link['to_device'])} to the device")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("blocks", "layout", "tokens", "MiB", "save GB/s", "of link", "load GB/s", "of link", "save", "load"):
        table.add_column(column, justify="left" if column in ("blocks", "layout") else "right")
    table.add_column("bytes equal")
    for row in report["alone"]:
        save, load = row["bytes"] / row["save_seconds"], row["bytes"] / row["load_seconds"]
        table.add_row(
            *(row["geometry"], row["layout"], f"{row['tokens']:,}", f"{row['bytes'] / 2**20:.1f}"),
            *(_gb(save), f"{save / link['to_host']:.2f}", _gb(load), f"{load / link['to_device']:.2f}"),
            *(_microseconds(row["save_seconds"]), _microseconds(row["load_seconds"])),
            "yes" if row["equal"] else "[red]NO[/red]",
        )
    console().print(table)
    if report["beside"]:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("beside", "direction", "slower by", "GB/s", "compute lost, ms per GB"):
            table.add_column(column, justify="left" if column in ("beside", "direction") else "right")
        for row in report["beside"]:
            table.add_row(
                *(row["compute"], row["direction"], f"{row['step_slower']:.1%}", _gb(row["bytes_per_second"])),
                f"{row['lost_seconds_per_gb'] * 1e3:.2f}",
            )
        console().print(table)


def _gb(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f}"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"
