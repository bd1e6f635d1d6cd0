"""A node's status as tables. Every field may be missing; then its cell is a dash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flexkv.config.sizes import format_size
from flexkv.status_fields import entries, is_number, mapping, number

_DASH = "-"
_LISTS = {
    "spaces": {
        "id": "space",
        "model": "model",
        "block_bytes": "block",
        "slots": "slots",
        "used": "used",
        "pinned": "pinned",
    },
    "engines": {"id": "engine", "model": "model", "ranks": "ranks", "attached_ranks": "attached", "state": "state"},
}
_DIRECTIONS = {"to_device": "host -> device", "to_host": "device -> host"}


def node_view(status: Mapping[str, Any], before: Mapping[str, Any] | None, seconds: float) -> RenderableType:
    """`before`, taken `seconds` earlier from the same node, makes rates; without it they are averages since start."""
    blocks: list[RenderableType] = [_tiers(status)]
    for key, columns in _LISTS.items():
        rows = entries(status, key)
        if rows:
            blocks.append(_list_table(rows, columns))
    blocks += [_lookups(status), _transfers(status, before, seconds)]
    lines = [line for line in (_numbers(status, key) for key in ("loads", "saves", "queues")) if line is not None]
    messages = mapping(status, "health").get("messages")
    if isinstance(messages, list):
        lines += (Text(f"! {message}", style="yellow") for message in messages)
    return Group(_title(status), *(Padding(block, (1, 0, 0, 0)) for block in [*blocks, Group(*lines)]), Text())


def _title(status: Mapping[str, Any]) -> Text:
    node = mapping(status, "node")
    state = str(mapping(status, "health").get("state", "unknown"))
    title = Text.assemble(
        "node ",
        (str(node.get("name", _DASH)), "bold"),
        f"  {node.get('mode', _DASH)}, pid {node.get('pid', _DASH)}, "
        f"version {node.get('version', _DASH)}, up {_duration(number(node, 'uptime_s'))}, health ",
    )
    return title.append(state, style="green" if state == "ok" else "yellow")


def _tiers(status: Mapping[str, Any]) -> Table:
    pool = mapping(status, "pool")
    size, used = number(pool, "bytes"), number(pool, "used_bytes")
    blocks = [number(space, "used") for space in entries(status, "spaces")]
    table = _table("tier", "size", "used", "full", "blocks", "pages")
    _add(
        table,
        "host",
        _size(size),
        _size(used),
        _share(used, size),
        _count(sum(one for one in blocks if one is not None)) if blocks else _DASH,
        str(pool.get("page_kind", _DASH)),
    )
    return table


def _list_table(rows: list[Mapping[str, Any]], columns: Mapping[str, str]) -> Table:
    table = _table(*columns.values())
    for row in rows:
        _add(table, *(_cell(key, row.get(key)) for key in columns))
    return table


def _cell(key: str, value: object) -> str:
    if key in ("id", "model", "state") or not is_number(value):
        return _DASH if value is None else str(value)
    return _size(value) if key.endswith("bytes") else _count(value)


def _lookups(status: Mapping[str, Any]) -> Table:
    lookups = mapping(status, "lookups")
    queried, hit = number(lookups, "blocks_queried"), number(lookups, "blocks_hit")
    reasons = {reason: count for reason, count in mapping(lookups, "miss_blocks").items() if is_number(count) and count}
    table = _table("lookups", "blocks asked", "hit", "hit rate", "misses by reason")
    ordered = sorted(reasons.items(), key=lambda item: -item[1])
    _add(
        table,
        _count(number(lookups, "count")),
        _count(queried),
        _count(hit),
        _share(hit, queried),
        ", ".join(f"{str(reason).replace('_', ' ')} {_count(count)}" for reason, count in ordered) or "none",
    )
    return table


def _transfers(status: Mapping[str, Any], before: Mapping[str, Any] | None, seconds: float) -> Table:
    transfers = mapping(status, "transfers")
    rate_title = "rate" if before is not None else "rate since start"
    table = _table("transfers", "bytes", rate_title, "blocks", "jobs", "failed", "p50", "p90", "p99", "max")
    for key in dict.fromkeys([*_DIRECTIONS, *transfers]):
        row = mapping(transfers, key)
        moved = number(row, "bytes")
        if before is not None:
            earlier = number(mapping(mapping(before, "transfers"), key), "bytes")
            rate = _rate(moved, earlier, seconds)
        else:
            rate = _rate(moved, 0, number(mapping(status, "node"), "uptime_s"))
        latency = mapping(row, "latency_us")
        _add(
            table,
            _DIRECTIONS.get(key, str(key)),
            _size(moved),
            rate,
            *(_count(number(row, column)) for column in ("blocks", "jobs", "failed")),
            *(_microseconds(number(latency, column)) for column in ("p50", "p90", "p99", "max")),
        )
    return table


def _numbers(status: Mapping[str, Any], key: str) -> Text | None:
    parts = []
    for name, value in mapping(status, key).items():
        if is_number(value):
            parts.append(f"{name} {_cell(str(name), value)}")
        elif isinstance(value, Mapping):
            parts += [f"{name}.{one} {_count(count)}" for one, count in value.items() if is_number(count) and count]
    return Text(f"{key}: " + ", ".join(parts)) if parts else None


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return table


def _add(table: Table, *cells: str) -> None:
    # Text, not str: names come from other processes and may hold what Rich would take for markup.
    table.add_row(*(Text(cell) for cell in cells))


def _size(value: float | None) -> str:
    return _DASH if value is None else format_size(int(value))


def _count(value: float | None) -> str:
    return _DASH if value is None else f"{value:,.0f}"


def _share(part: float | None, whole: float | None) -> str:
    return f"{100 * part / whole:.1f} %" if part is not None and whole else _DASH


def _rate(now: float | None, then: float | None, seconds: float | None) -> str:
    if now is None or then is None or not seconds or seconds <= 0:
        return _DASH
    rate = max(now - then, 0) / seconds
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.2f} MB/s"


def _microseconds(value: float | None) -> str:
    if value is None:
        return _DASH
    return f"{value:.0f} us" if value < 1000 else f"{value / 1e3:.1f} ms" if value < 1e6 else f"{value / 1e6:.1f} s"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _DASH
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
