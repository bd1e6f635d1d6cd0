"""What a node says of its cluster, as a table and lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from flexkv.cli import cells
from flexkv.status_fields import entries, mapping, number

_COLUMNS = ("other node", "address", "silent", "blocks", "on the way", "rate", "state")


def peer_table(cluster: Mapping[str, Any]) -> Table:
    table = cells.table(*_COLUMNS)
    for peer in entries(cluster, "peers"):
        cells.add(
            table,
            str(peer.get("name", cells.DASH)),
            str(peer.get("address", cells.DASH)),
            cells.duration(number(peer, "silent_s")),
            cells.count(number(peer, "blocks")),
            cells.size(number(peer, "waiting_bytes")),
            cells.rate(number(peer, "read_bytes_per_s") or None, 0, 1),  # 0: not known
            _state(peer),
        )
    return table


_CONDITIONS = {
    "drains": "drains: it gives nothing more",
    "drained": "drained: it gives nothing until it is started anew",
    "ends": "has ended",
}


def _state(peer: Mapping[str, Any]) -> str:
    if condition := _CONDITIONS.get(str(peer.get("condition"))):
        return condition
    return "not asked for a while: it did not answer" if peer.get("resting") else ""


def cluster_lines(cluster: Mapping[str, Any]) -> list[Text]:
    directory = mapping(cluster, "directory")
    lines = [
        Text(
            f"directory: knows {cells.count(number(directory, 'blocks'))} blocks of {len(entries(cluster, 'peers'))} "
            f"other nodes in {cells.size(number(directory, 'memory_bytes'))}, tells of "
            f"{cells.count(number(directory, 'told_blocks'))}"
        )
    ]
    behind = [
        f"{cells.count(value)} {what}"
        for key, what in (
            ("spaces_loading", "lists of blocks being loaded"),
            ("spaces_stuck", "that cannot be followed for now"),
            ("left_out_blocks", "blocks left out for want of room"),
        )
        if (value := number(directory, key))
    ]
    if behind:
        lines.append(Text(f"directory: {', '.join(behind)}", style="yellow"))
    if directory.get("trouble"):
        lines.append(Text(f"! Redis: {directory['trouble']}", style="yellow"))
    for key, what in (("read", "read from others"), ("lent", "read by others")):
        part = mapping(cluster, key)
        ended = cells.reasons({why: n for why, n in mapping(part, "ended").items() if why != "done"})
        stopped = number(part, "given_up")
        lines.append(
            Text(
                f"{what}: {cells.count(number(part, 'blocks'))} blocks, {cells.size(number(part, 'bytes'))} in "
                f"{cells.count(number(part, 'requests'))} requests, {cells.count(number(part, 'under_way'))} under way"
                + (f"; ended early: {ended}" if ended else "")
                + (f"; taken to have stopped: {cells.count(stopped)}" if stopped else "")
            )
        )
    return lines
