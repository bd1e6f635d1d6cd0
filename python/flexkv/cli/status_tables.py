"""A node's status as tables. Every field may be missing; then its cell is a dash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flexkv.cli import cells
from flexkv.cli.cluster_tables import cluster_lines
from flexkv.cli.drive_tables import drive_lines, drive_table, ssd_row
from flexkv.cli.remote_tables import remote_lines
from flexkv.status_fields import entries, is_number, mapping, number

_LISTS = {
    "spaces": {
        "id": "space",
        "model": "model",
        "block_bytes": "block",
        "slots": "slots",
        "used": "used",
        "reserved": "reserved",
        "disk_slots": "SSD slots",
        "disk_used": "SSD used",
    },
    "engines": {"id": "engine", "model": "model", "ranks": "ranks", "attached_ranks": "attached", "state": "state"},
}
_DIRECTIONS = {
    "to_device": "host -> device",
    "to_host": "device -> host",
    "from_disk": "SSD -> host",
    "to_disk": "host -> SSD",
    "from_remote": "beyond this machine -> host",
    "to_remote": "host -> remote tier",
}
# Where a field's name alone does not say what is counted.
_NAMES = {"peers": "attached processes (schedulers and ranks of engines)"}


def node_view(status: Mapping[str, Any], before: Mapping[str, Any] | None, seconds: float) -> RenderableType:
    """`before`, taken `seconds` earlier from the same node, makes rates; without it they are averages since start."""
    blocks: list[RenderableType] = [_tiers(status)]
    drives = drive_table(status)
    if drives is not None:
        blocks.append(drives)
    for key, columns in _LISTS.items():
        rows = entries(status, key)
        if rows:
            blocks.append(_list_table(rows, columns))
    blocks += [_lookups(status), _transfers(status, before, seconds)]
    lines = [line for line in (_numbers(status, key) for key in ("loads", "saves", "queues")) if line is not None]
    lines += [*_failure_lines(status), *drive_lines(status)]
    if cluster := mapping(status, "cluster"):
        lines += cluster_lines(cluster)
    if remote := mapping(status, "remote"):
        lines += remote_lines(remote)
    messages = mapping(status, "health").get("messages")
    if isinstance(messages, list):
        lines += (Text(f"! {message}", style="yellow") for message in messages)
    return Group(_title(status), *(Padding(block, (1, 0, 0, 0)) for block in [*blocks, Group(*lines)]), Text())


def _title(status: Mapping[str, Any]) -> Text:
    node = mapping(status, "node")
    state = str(mapping(status, "health").get("state", "unknown"))
    title = Text.assemble(
        "node ",
        (str(node.get("name", cells.DASH)), "bold"),
        f"  {node.get('mode', cells.DASH)}, pid {node.get('pid', cells.DASH)}, "
        f"version {node.get('version', cells.DASH)}, up {cells.duration(number(node, 'uptime_s'))}, health ",
    )
    return title.append(state, style="green" if state == "ok" else "yellow")


def _tiers(status: Mapping[str, Any]) -> Table:
    pool = mapping(status, "pool")
    size, used = number(pool, "bytes"), number(pool, "used_bytes")
    blocks = [number(space, "used") for space in entries(status, "spaces")]
    table = cells.table("tier", "size", "used", "full", "blocks", "evicted", "pages")
    cells.add(
        table,
        "host",
        cells.size(size),
        cells.size(used),
        cells.share(used, size),
        cells.count(sum(one for one in blocks if one is not None)) if blocks else cells.DASH,
        cells.count(number(mapping(status, "evictions"), "blocks")),
        str(pool.get("page_kind", cells.DASH)),
    )
    ssd = ssd_row(status)
    if ssd is not None:
        cells.add(table, *ssd)
    return table


def _list_table(rows: list[Mapping[str, Any]], columns: Mapping[str, str]) -> Table:
    table = cells.table(*columns.values())
    for row in rows:
        cells.add(table, *(_cell(key, row.get(key)) for key in columns))
    return table


def _cell(key: str, value: object) -> str:
    if key in ("id", "model", "state") or not is_number(value):
        return cells.DASH if value is None else str(value)
    return cells.size(value) if key.endswith("bytes") else cells.count(value)


def _lookups(status: Mapping[str, Any]) -> Table:
    lookups = mapping(status, "lookups")
    queried, hit = number(lookups, "blocks_queried"), number(lookups, "blocks_hit")
    table = cells.table("lookups", "blocks asked", "hit", "hit rate", "of them on SSD", "misses by reason")
    cells.add(
        table,
        cells.count(number(lookups, "count")),
        cells.count(queried),
        cells.count(hit),
        cells.share(hit, queried),
        cells.count(number(lookups, "disk_blocks_hit")),
        cells.reasons(mapping(lookups, "miss_blocks")) or "none",
    )
    return table


def _transfers(status: Mapping[str, Any], before: Mapping[str, Any] | None, seconds: float) -> Table:
    transfers = mapping(status, "transfers")
    rate_title = "rate" if before is not None else "rate since start"
    table = cells.table("transfers", "bytes", rate_title, "blocks", "jobs", "failed", "p50", "p90", "p99", "max")
    for key in dict.fromkeys(["to_device", "to_host", *transfers]):
        row = mapping(transfers, key)
        moved = number(row, "bytes")
        if before is not None:
            earlier = number(mapping(mapping(before, "transfers"), key), "bytes")
            rate = cells.rate(moved, earlier, seconds)
        else:
            rate = cells.rate(moved, 0, number(mapping(status, "node"), "uptime_s"))
        latency = mapping(row, "latency_us")
        cells.add(
            table,
            _DIRECTIONS.get(key, str(key)),
            cells.size(moved),
            rate,
            *(cells.count(number(row, column)) for column in ("blocks", "jobs")),
            cells.count(_failed(row)),
            *(cells.microseconds(number(latency, column)) for column in ("p50", "p90", "p99", "max")),
        )
    return table


def _failed(row: Mapping[str, Any]) -> float | None:
    """Jobs to and from devices, blocks to and from drives."""
    if "failed_blocks" not in row:
        return number(row, "failed")
    return sum(count for count in mapping(row, "failed_blocks").values() if is_number(count))


def _failure_lines(status: Mapping[str, Any]) -> list[Text]:
    transfers = mapping(status, "transfers")
    failed = {key: cells.reasons(mapping(mapping(transfers, key), "failed_blocks")) for key in transfers}
    return [Text(f"{_DIRECTIONS.get(key, key)}, blocks failed: {why}") for key, why in failed.items() if why]


def _numbers(status: Mapping[str, Any], key: str) -> Text | None:
    parts = []
    for name, value in mapping(status, key).items():
        if is_number(value):
            parts.append(f"{_NAMES.get(name, name)} {_cell(str(name), value)}")
        elif isinstance(value, Mapping):
            shown = [(one, count) for one, count in value.items() if is_number(count) and count]
            parts += [f"{name}.{one} {cells.count(count)}" for one, count in shown]
    return Text(f"{key}: " + ", ".join(parts)) if parts else None
