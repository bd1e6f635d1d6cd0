"""The SSD tier in `flexkv status`: nothing of it where a node has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from flexkv.cli import cells
from flexkv.status_fields import entries, is_number, mapping, number


_LATEST_CHOICES = 3


def ssd_row(status: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Its row in the table of tiers."""
    drives = entries(mapping(status, "disk"), "drives")
    if not drives:
        return None
    if all(drive.get("reads") is False for drive in drives):
        return "SSD", "off", *[cells.DASH] * 5
    size, used = _sum(drives, "bytes"), _sum(drives, "used_bytes")
    blocks = _sum(entries(status, "spaces"), "disk_used")
    evicted = number(mapping(status, "disk"), "evicted_blocks")
    counts = (cells.count(blocks), cells.count(evicted))
    return "SSD", cells.size(size), cells.size(used), cells.share(used, size), *counts, cells.DASH


def drive_table(status: Mapping[str, Any]) -> Table | None:
    drives = entries(mapping(status, "disk"), "drives")
    if not drives:
        return None
    table = cells.table("drive", "used", "written", "read", "failures", "queued", "state")
    for drive in drives:
        failures = _sum([drive], "checksum_failures", "failed_reads", "failed_writes")
        cells.add(
            table,
            str(drive.get("directory", cells.DASH)),
            cells.DASH if drive.get("reads") is False else cells.size(number(drive, "used_bytes")),
            *(cells.size(number(drive, key)) for key in ("bytes_written", "bytes_read")),
            cells.count(failures),
            cells.count(number(drive, "queued")),
            _state(drive),
        )
    return table


def drive_lines(status: Mapping[str, Any]) -> list[Text]:
    """What was found at the start, how fast drives read, what was chosen with that, what they may still take, and how they
    are read and written."""
    disk = mapping(status, "disk")
    lines = [
        f"SSD: reading what the drives hold of {space.get('model', cells.DASH)}"
        for space in entries(status, "spaces")
        if space.get("recovering") is True
    ]
    lines += [_opened(space) for space in entries(disk, "opened")]
    if number(disk, "read_bytes_per_s"):
        lines.append(f"SSD: reads measured at {cells.speed(number(disk, 'read_bytes_per_s'))}")
    lines += _choices(mapping(disk, "choices"))
    lines += _scrub(mapping(disk, "scrub"))
    endurance = mapping(disk, "endurance")
    if endurance:
        lines.append(_endurance(endurance))
    drives = [drive for drive in entries(disk, "drives") if mapping(drive, "endurance")]
    if len(drives) > 1 and number(endurance, "daily_bytes"):
        lines += [_endurance(drive["endurance"], f"{drive.get('directory', cells.DASH)}: ") for drive in drives]
    admission = cells.reasons(mapping(disk, "admission"))
    if admission:
        lines.append(f"SSD: blocks offered: {admission}")
    lines += [f"SSD: {form}" for drive in entries(disk, "drives") if (form := drive.get("form"))]
    return [Text(line) for line in lines]


def _scrub(scrub: Mapping[str, Any]) -> list[str]:
    """The latest check of all blocks (`flexkv disk check`)."""
    if not scrub:
        return []
    drives = entries(scrub, "drives")
    checked = _sum(drives, "checked_blocks")
    took = cells.duration(number(scrub, "seconds"))
    if scrub.get("state") == "running":
        text = f"SSD: being checked for {took}: {cells.count(checked)} of {cells.count(number(scrub, 'blocks'))} blocks"
    else:
        ended = cells.duration(number(scrub, "ended_seconds_ago"))
        text = f"SSD: {cells.count(checked)} blocks checked in {took}, {scrub.get('state', cells.DASH)} {ended} ago"
    found = [f"{cells.count(_sum(drives, f'{what}_blocks'))} {what}" for what in ("damaged", "unreadable", "unchecked")]
    return [", ".join([text, *found])]


def _choices(choices: Mapping[str, Any]) -> list[str]:
    """How often requests were to load what drives hold, and the latest of these choices."""
    counts = [f"{name} {cells.count(number(choices, name))}" for name in ("all", "part", "none") if choices.get(name)]
    if not counts:
        return []
    recomputed = cells.count(number(choices, "recomputed_blocks"))
    lines = [f"SSD: of what was found, requests were to load {', '.join(counts)}; {recomputed} blocks computed instead"]
    return lines + [_choice(choice) for choice in entries(choices, "latest")[-_LATEST_CHOICES:]]


def _choice(choice: Mapping[str, Any]) -> str:
    found = sum(number(choice, f"{where}_blocks") or 0 for where in ("engine", "host", "coming", "drive"))
    of_engine = number(choice, "engine_blocks")
    text = (
        f"SSD: {cells.duration(number(choice, 'seconds_ago'))} ago {cells.count(number(choice, 'chosen_blocks'))} of "
        f"{cells.count(found)} blocks ({f'{cells.count(of_engine)} in the engine, ' if of_engine else ''}"
        f"{cells.count(number(choice, 'host_blocks'))} in host memory)"
    )
    if choice.get("basis") != "cost":
        return f"{text}: {choice.get('basis', cells.DASH)}"
    expected = (cells.microseconds(number(choice, f"expected{what}_us")) for what in ("", "_if_all", "_if_none"))
    return "{}: {} expected, {} with all, {} with none".format(text, *expected)


def _state(drive: Mapping[str, Any]) -> str:
    if drive.get("reads") is False:
        state = "off"
    elif drive.get("writes") is False:
        state = "reads only"
    else:
        state = "ok" if "reads" in drive else cells.DASH
    why = drive.get("why")
    return f"{state}: {why}" if why else state


def _opened(space: Mapping[str, Any]) -> str:
    seconds = number(space, "seconds")
    took = cells.DASH if seconds is None else f"{seconds:.2f} s"
    text = f"SSD: {cells.count(number(space, 'recovered_blocks'))} blocks found in {took}"
    discarded = cells.reasons(mapping(space, "discarded"))
    text += f", discarded: {discarded}" if discarded else ", none discarded"
    dropped = space.get("dropped_files")
    return "; ".join([text, *map(str, dropped)] if isinstance(dropped, list) else [text])


def _endurance(endurance: Mapping[str, Any], of: str = "") -> str:
    def size(key: str) -> str:
        return cells.size(number(endurance, key))

    text = f"SSD: {of}{size('written_bytes')} written in all, {size('last_day_bytes')} in the last 24 hours"
    if not number(endurance, "daily_bytes"):
        return text
    pressure = number(endurance, "pressure")
    text += f" of {size('daily_bytes')} allowed, pressure {cells.DASH if pressure is None else f'{pressure:.2f}'}"
    days = number(endurance, "days_left")
    if days is None:
        return text
    years = days / 365
    left = f"{days:,.0f} days" if years < 2 else f"{years:.1f} years" if years < 100 else "more than 100 years"
    return f"{text}, {left} of life left"


def _sum(rows: list[Mapping[str, Any]], *keys: str) -> float | None:
    values = [value for row in rows for key in keys if is_number(value := row.get(key))]
    return sum(values) if values else None
