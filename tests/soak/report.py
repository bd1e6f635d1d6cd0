"""What came out, for people: a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MIB = 1 << 20


def _value(what: str, value: float) -> str:
    return f"{value / _MIB:.1f} MiB" if "Rss" in what or "bytes" in what else f"{value:.1f}"


def print_report(result: dict[str, Any]) -> None:
    print(f"\n{result['minutes']:.1f} minutes, seed {result['seed']}")
    print(f"\n{'what':38} {'points':>6} {'first third':>12} {'last third':>12} {'largest':>12} {'growth':>12} {'allowed':>12}")
    for one in result["trends"]:
        cells = (_value(one["what"], one[key]) for key in ("first", "last", "largest", "growth", "limit"))
        print(f"{one['what']:38} {one['points']:>6} " + " ".join(f"{cell:>12}" for cell in cells), end="")
        print("  GROWS" if one["grows"] else "")
    for title in ("faults", "counts", "longest_s", "node", "figures"):
        print(f"\n{title}")
        for name, value in result[title].items():
            print(f"  {name:38} {value:,.3f}" if isinstance(value, float) else f"  {name:38} {value}")
    print("\nproblems" if result["problems"] else "\nno problems")
    for problem in result["problems"][:50]:
        print(f"  {problem}")


def plot(samples: list[dict[str, Any]], path: Path) -> bool:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(5, 1, figsize=(11, 15), sharex=True)
    names = sorted({name for sample in samples for name in sample["processes"]})
    for axis, series, scale in ((axes[0], "RssAnon", _MIB), (axes[1], "fds", 1), (axes[2], "threads", 1)):
        for name in names:
            seen = [(s["t_s"], s["processes"][name][series] / scale) for s in samples if name in s["processes"]]
            axis.plot(*zip(*seen, strict=True), ".-", label=name, linewidth=0.8)
        axis.set_ylabel(f"{series}, MiB" if scale > 1 else series)
        axis.legend(loc="upper right", fontsize=8)
    told = [s for s in samples if s["status"] is not None]
    for queue in ("jobs_in_flight", "disk_fetches", "disk_writes", "peers"):
        axes[3].plot([s["t_s"] for s in told], [s["status"]["queues"][queue] for s in told], ".-", label=queue, linewidth=0.8)
    axes[3].set_ylabel("queues")
    axes[3].legend(loc="upper right", fontsize=8)
    for name in samples[0]["disk_bytes"]:
        axes[4].plot([s["t_s"] for s in samples], [s["disk_bytes"][name] / _MIB for s in samples], label=name)
    axes[4].set_ylabel("on drives, MiB")
    axes[4].legend(loc="upper right", fontsize=8)
    axes[4].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return True
