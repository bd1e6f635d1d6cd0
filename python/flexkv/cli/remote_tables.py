"""What a node says of its remote tier, as lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from flexkv.cli import cells
from flexkv.status_fields import mapping, number


def remote_lines(remote: Mapping[str, Any]) -> list[Text]:
    known = f"{cells.count(number(remote, 'known_blocks'))} blocks known"
    if not number(remote, "looked_through"):
        known = "not looked through yet"
    lines = [Text(f"remote tier: {remote.get('url', cells.DASH)}: {known}")]
    for key, what in (("read", "read from it"), ("written", "written to it")):
        part = mapping(remote, key)
        ended = cells.reasons({why: n for why, n in mapping(part, "ended").items() if why != "done"})
        speed = number(part, "bytes_per_s")
        lines.append(
            Text(
                f"{what}: {cells.count(number(part, 'blocks'))} blocks, {cells.size(number(part, 'bytes'))}, "
                f"{cells.count(number(part, 'under_way'))} requests under way"
                + (f", {cells.speed(speed)} while it is read" if speed else "")
                + (f"; ended early: {ended}" if ended else "")
            )
        )
    admission = mapping(remote, "admission")
    refused = cells.reasons({key.removeprefix("refused_"): n for key, n in admission.items() if key != "admitted"})
    if refused:
        lines.append(Text(f"not worth writing to it, blocks: {refused}"))
    if faults := cells.reasons(mapping(remote, "faults")):
        lines.append(Text(f"found wrong in it: {faults}", style="yellow"))
    return lines
