"""Whether anything grew, and whether anything was that must not be."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_MIB = 1 << 20
_YOUNG_S = 10.0  # a process that has just started is still growing to its size
_POINTS_MIN = 10


@dataclass(frozen=True)
class Limit:
    """Growth over the time that was looked at that is still noise."""

    at_least: float
    share: float = 0.0  # of the median

    def of(self, median: float) -> float:
        return max(self.at_least, self.share * median)


_MEMORY = Limit(3 * _MIB, 0.05)
_COUNT = Limit(1.5)
_QUEUE = Limit(64, 0.5)
_PROCESS_SERIES = {"RssAnon": _MEMORY, "fds": _COUNT, "threads": _COUNT, "pool_maps": _COUNT}


@dataclass(frozen=True)
class Trend:
    what: str
    points: int
    span_s: float
    first: float  # medians of the first and the last third
    last: float
    largest: float
    growth: float  # of the line through all points, over the span
    limit: float

    @property
    def grows(self) -> bool:
        return self.growth > self.limit

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "grows": self.grows}


def trend(what: str, points: list[tuple[float, float]], limit: Limit) -> Trend | None:
    """Theil-Sen: the median of the slopes between all pairs, which a third of the points cannot mislead."""
    if len(points) < _POINTS_MIN:
        return None
    t, y = np.array(points).T
    one, other = np.triu_indices(len(t), 1)
    slope = float(np.median((y[other] - y[one]) / (t[other] - t[one])))
    third = len(y) // 3
    return Trend(
        what,
        len(points),
        float(t[-1] - t[0]),
        float(np.median(y[:third])),
        float(np.median(y[-third:])),
        float(y.max()),
        slope * float(t[-1] - t[0]),
        limit.of(float(np.median(y))),
    )


def process_trends(samples: list[dict[str, Any]], warm_up_s: float) -> list[Trend]:
    """Of each process that lived long, from its warm-up on; and of what the short-lived had in their lives, over all of
    them: what is left by one and inherited by the next grows there."""
    lives: dict[tuple[str, int], list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for sample in samples:
        for name, seen in sample["processes"].items():
            lives[name, seen["incarnation"]].append((sample["t_s"], seen))
    found = []
    for series, limit in _PROCESS_SERIES.items():
        inherited: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for (name, incarnation), life in lives.items():
            old = [(t, seen[series]) for t, seen in life if seen["age_s"] >= warm_up_s]
            if (of_one := trend(f"{name}.{incarnation} {series}", old, limit)) is not None:
                found.append(of_one)
            grown = [(t, seen[series]) for t, seen in life if _YOUNG_S <= seen["age_s"] < warm_up_s + _YOUNG_S]
            if grown:
                inherited[name].append((grown[0][0], float(np.median([value for _, value in grown]))))
        for name, points in inherited.items():
            if (of_all := trend(f"{name}, each life, {series}", points, limit)) is not None:
                found.append(of_all)
    return found


def queue_trends(samples: list[dict[str, Any]], warm_up_s: float) -> list[Trend]:
    told = [(s["t_s"], s["status"]) for s in samples if s["status"] is not None and s["t_s"] >= warm_up_s]
    series = {
        "jobs in flight": lambda s: s["queues"]["jobs_in_flight"],
        "blocks fetched": lambda s: s["queues"]["disk_fetches"],
        "blocks to write": lambda s: s["queues"]["disk_writes"],
        "requests at drives": lambda s: sum(drive["queued"] for drive in s["drives"]),
        "peers": lambda s: s["queues"]["peers"],
        "sequences": lambda s: s["sequences"],
        "slots reserved": lambda s: s["reserved"],
    }
    found = [trend(name, [(t, float(of(s))) for t, s in told], _QUEUE) for name, of in series.items()]
    metadata = [(t, float(s["metadata_bytes"])) for t, s in told]
    found.append(trend("index, bytes", metadata, _MEMORY))
    for name in ("runtime", "shm", "ssd"):
        points = [(s["t_s"], float(s["leftovers"][name])) for s in samples if s["t_s"] >= warm_up_s]
        found.append(trend(f"names in {name}", points, _COUNT))
    return [one for one in found if one is not None]


def over_limit(samples: list[dict[str, Any]], share: int) -> list[dict[str, Any]]:
    return [
        {"kind": "disk limit crossed", "directory": name, "bytes": used, "limit": share, "t_s": sample["t_s"]}
        for sample in samples
        for name, used in sample["disk_bytes"].items()
        if used > share
    ]


def excused(report: dict[str, Any], away: dict[str, list[tuple[float, float]]]) -> bool:
    """A save is told by the daemon: while that was killed or stopped, it could not be. A load is told by its ranks, in
    the engine's own process; what is waited for in a call takes as long as that is stopped."""
    if "over_s" not in report or report.get("operation") == "load":  # the engine's loop leaves out its own stops there
        return False
    who = "daemon" if report.get("operation") == "save" else report["engine"].split(".")[0]
    missing = sum(max(0.0, min(end, report["ended"]) - max(begin, report["began"])) for begin, end in away[who])
    return report["over_s"] <= missing
