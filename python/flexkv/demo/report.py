"""What the demo shows: a table per turn, a plot, and whether both runs gave the same tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from .workload import Request, Workload

Run = list[Request]


def first_difference(without: Run, with_flexkv: Run) -> str | None:
    """Says where the two runs' outputs part, or None if every token of every answer is equal."""
    if len(without) != len(with_flexkv):
        return f"{len(without)} requests without FlexKV, {len(with_flexkv)} with it"
    for a, b in zip(without, with_flexkv, strict=True):
        if a.tokens != b.tokens:
            pairs = zip(a.tokens, b.tokens, strict=False)
            at = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.tokens), len(b.tokens)))
            return (
                f"conversation {a.conversation + 1}, turn {a.turn + 1}, output token {at + 1}: "
                f"{a.tokens[at : at + 4]} without FlexKV, {b.tokens[at : at + 4]} with it"
            )
    return None


def turns_table(workload: Workload, without: Run, with_flexkv: Run) -> Table:
    table = Table(title="Time to first token (TTFT), medians over the conversations of a turn")
    for heading in (
        "turn",
        "prompt tokens",
        "from engine's cache",
        "from FlexKV",
        "TTFT without",
        "TTFT with",
        "speed-up",
    ):
        table.add_column(heading, justify="right")
    for turn in range(workload.turns):
        a, b = _of_turn(without, turn), _of_turn(with_flexkv, turn)
        slow, fast = _median(a, lambda r: r.ttft_seconds), _median(b, lambda r: r.ttft_seconds)
        table.add_row(
            str(turn + 1),
            f"{_median(b, lambda r: r.prompt_tokens):,.0f}",
            f"{_median(b, lambda r: r.engine_tokens):,.0f}",
            f"{_median(b, lambda r: r.flexkv_tokens):,.0f}",
            f"{slow:.3f} s",
            f"{fast:.3f} s",
            f"{slow / fast:.1f}x",
        )
    return table


def comments(workload: Workload, without: Run, with_flexkv: Run) -> list[str]:
    """A line on what a reader of the table may stumble over: the first turn, and turns that are slower with FlexKV."""
    lines = ["Turn 1: nothing can be known yet; each prompt is computed, and with FlexKV saved as well."]
    slower = []
    for turn in range(1, workload.turns):
        slow, fast = (_median(_of_turn(run, turn), lambda r: r.ttft_seconds) for run in (without, with_flexkv))
        if fast > slow:
            slower.append(turn + 1)
    if slower:
        lines.append(
            f"Slower with FlexKV in turn {', '.join(map(str, slower))}: prompts this short ({workload.first_tokens:,} tokens "
            "at first) are computed in about the time that a look-up and a copy take; try --first-tokens "
            f"{4 * max(workload.first_tokens, 512)}, and a machine with nothing else to do."
        )
    return lines


def plot(path: Path, title: str, workload: Workload, without: Run, with_flexkv: Run) -> None:
    """Median TTFT per turn as bars, each conversation as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=140, layout="constrained")
    top = max(r.ttft_seconds for r in without + with_flexkv)
    for run, label, colour, shift in (
        (without, "without FlexKV", "#9aa5b1", -0.2),
        (with_flexkv, "with FlexKV", "#1f77b4", 0.2),
    ):
        for turn in range(workload.turns):
            requests = _of_turn(run, turn)
            median = _median(requests, lambda r: r.ttft_seconds)
            axes.bar(turn + shift, median, width=0.38, color=colour, label=label if turn == 0 else None)
            axes.scatter(
                [turn + shift] * len(requests), [r.ttft_seconds for r in requests], s=10, color="#333", zorder=3
            )
            axes.text(turn + shift, max(r.ttft_seconds for r in requests) + 0.015 * top, f"{median:.2f} s", ha="center")
    names = []
    for turn in range(workload.turns):
        requests = _of_turn(with_flexkv, turn)
        names.append(
            f"turn {turn + 1}\n{_median(requests, lambda r: r.prompt_tokens):,.0f} prompt tokens,\n"
            f"{_median(requests, lambda r: r.flexkv_tokens):,.0f} from FlexKV"
        )
    axes.set_xticks(range(workload.turns), names)
    axes.set_ylabel("time to first token, seconds")
    axes.set_ylim(0, top * 1.12)
    axes.set_title(title, fontsize=10)
    axes.legend(loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _of_turn(run: Run, turn: int) -> Run:
    return [request for request in run if request.turn == turn]


def _median(run: Run, value: Callable[[Request], float]) -> float:
    return statistics.median(value(request) for request in run)
