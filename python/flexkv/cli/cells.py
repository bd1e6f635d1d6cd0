"""The cells of the status tables. What is not known is a dash."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from flexkv.config.sizes import format_size
from flexkv.status_fields import is_number

DASH = "-"


def table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return made


def add(rows: Table, *texts: str) -> None:
    # Text, not str: names come from other processes and may hold what Rich would take for markup.
    rows.add_row(*(Text(text) for text in texts))


def size(value: float | None) -> str:
    return DASH if value is None else format_size(int(value))


def count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def share(part: float | None, whole: float | None) -> str:
    return f"{100 * part / whole:.1f} %" if part is not None and whole else DASH


def rate(now: float | None, then: float | None, seconds: float | None) -> str:
    if now is None or then is None or not seconds or seconds <= 0:
        return DASH
    return speed(max(now - then, 0) / seconds)


def speed(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value / 1e9:.2f} GB/s" if value >= 1e9 else f"{value / 1e6:.2f} MB/s"


def microseconds(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:.0f} us" if value < 1000 else f"{value / 1e3:.1f} ms" if value < 1e6 else f"{value / 1e6:.1f} s"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def reasons(counts: Mapping[str, object]) -> str:
    """Those that are not zero, the most frequent first: `never seen 90, evicted 10`; empty if there are none."""
    present = [(reason, value) for reason, value in counts.items() if is_number(value) and value]
    ordered = sorted(present, key=lambda item: -item[1])
    return ", ".join(f"{str(reason).replace('_', ' ')} {count(value)}" for reason, value in ordered)
