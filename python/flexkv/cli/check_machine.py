"""`flexkv doctor`: whether this machine can run FlexKV well, or its cluster works, and what to change."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from flexkv.cli import measure_machine
from flexkv.cli.common import EXIT_FAILED, console, load_core, load_settings, print_json, require_core
from flexkv.cli.versions import package_version
from flexkv.config import Settings
from flexkv.doctor.cluster import check_cluster
from flexkv.doctor.drives import check_drives
from flexkv.doctor.finding import Finding, Verdict, wrong
from flexkv.doctor.gds import check_gds
from flexkv.doctor.gpu import check_gpus
from flexkv.doctor.host import check_host

_STYLES = {Verdict.OK: "green", Verdict.BETTER: "yellow", Verdict.WRONG: "bold red"}


def run(as_json: bool, measure: bool, cluster: bool, config: Path | None) -> None:
    settings = load_settings(config)
    findings = list(check_cluster(settings, require_core()) if cluster else _findings(settings))
    if not as_json:
        _show(findings)
    measured = measure_machine.measure(settings) if measure else None
    if as_json:
        print_json(_as_json(findings) | ({} if measured is None else {"measured": measured}))
    elif measured is not None:
        measure_machine.show(measured)
    if any(one.verdict is Verdict.WRONG for one in findings) or (measured and measure_machine.is_wrong(measured)):
        raise typer.Exit(EXIT_FAILED)


def _findings(settings: Settings) -> Iterator[Finding]:
    core = None
    try:
        core = load_core()
        yield Finding(
            "FlexKV", f"{package_version()} on Linux {platform.release()}, Python {platform.python_version()}"
        )
    except ImportError as error:
        yield wrong("FlexKV", f"the compiled part cannot be imported: {error}", "build it: pip install .")
    yield from check_host(settings, core)
    yield from check_drives(settings)
    yield from check_gpus(core)
    yield check_gds(settings)


def _show(findings: list[Finding]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    for one in findings:
        style = _STYLES[one.verdict]
        advice = f"\n-> {one.advice}" if one.advice else ""
        # Text, not str: paths and messages may hold what Rich would take for markup.
        line = Text.assemble((one.looked_at, "bold"), f": {one.found}", (advice, style))
        table.add_row(Text(one.verdict.value, style=style), line)
    console().print(table)
    counts = Counter(one.verdict for one in findings)
    print(", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict))


def _as_json(findings: list[Finding]) -> dict[str, Any]:
    return {
        "checks": [
            {
                "looked_at": one.looked_at,
                "verdict": one.verdict.value,
                "found": one.found,
                "advice": one.advice,
            }
            | ({"figures": dict(one.figures)} if one.figures else {})
            for one in findings
        ]
    }
