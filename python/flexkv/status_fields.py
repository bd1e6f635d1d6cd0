"""Reads a node's status (docs/reference/status.md) whatever of it is missing: older nodes tell less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard


# How a node's messages begin about what it was to use and does not.
SSD_OFF = "SSD cache is off: "
CLUSTER_OFF = "the cluster is off: "


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def mapping(status: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = status.get(key)
    return value if isinstance(value, Mapping) else {}


def entries(status: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = status.get(key)
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def number(status: Mapping[str, Any], key: str) -> float | None:
    value = status.get(key)
    return value if is_number(value) else None


def messages(status: Mapping[str, Any], beginning: str) -> list[str]:
    """What the node says of its health after this beginning of a sentence."""
    told = mapping(status, "health").get("messages")
    texts = [str(one) for one in told] if isinstance(told, list) else []
    return [text.removeprefix(beginning) for text in texts if text.startswith(beginning)]


_UNDONE = {
    "jobs": "transfers of engines",
    "loans": "reads by other nodes",
    "disk_writes": "blocks for drives",
    "remote_writes": "blocks for the remote tier",
    "host_only_blocks": "blocks that only host memory has and the remote tier did not take yet",
}


def undone(drain: Mapping[str, Any]) -> str:
    """What a node that drains still has to do, for people."""
    left = [f"{value:,.0f} {what}" for key, what in _UNDONE.items() if (value := number(drain, key))]
    if drain.get("looks"):
        left.append("it looks for more that only host memory has")
    if not left and drain.get("lends"):
        left = ["other nodes may have found blocks here a moment ago"]
    return ", ".join(left) or "nothing is left"


def buckets(histogram: Mapping[str, Any]) -> list[tuple[float, float]] | None:
    """(upper bound in microseconds, cumulative count), the last bound infinite; None where there is no histogram."""
    bounds, counts = histogram.get("bounds_us"), histogram.get("counts")
    if not isinstance(bounds, list) or not _are_numbers(counts):
        return None
    if bounds[-1:] == ["inf"]:
        bounds = bounds[:-1]
    elif len(bounds) == len(counts):
        counts = [*counts, 0]  # nothing above the last bound
    if not _are_numbers(bounds) or len(counts) != len(bounds) + 1:
        return None
    result, total = [], 0.0
    for bound, count in zip([*bounds, float("inf")], counts, strict=True):
        total += count
        result.append((float(bound), total))
    return result


def _are_numbers(value: object) -> TypeGuard[Sequence[int | float]]:
    return isinstance(value, list) and all(is_number(one) for one in value)
