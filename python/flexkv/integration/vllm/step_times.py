"""How long the engine's steps take: what the node needs to know to judge whether loading beats computing."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

# More steps than this are never under way at once: the count of begun and ended ones has gone apart.
_UNDER_WAY_MAX = 8
# Steps that compute less than this are decodes, and say nothing about prompts.
_TOKENS_MIN = 32


class StepTimes:
    """Steps end in the order in which they begin, but the next may begin before (async scheduling): a step takes the
    time from its beginning, or from the end of the one before it if that is later, to its own end."""

    def __init__(self) -> None:
        self._begun: deque[tuple[float, int, float]] = deque()  # when, tokens, pairs
        self._last_end = 0.0

    def begin(self, output: SchedulerOutput) -> None:
        tokens = output.total_num_scheduled_tokens
        if tokens == 0:
            return  # no forward: its end is not told
        if len(self._begun) >= _UNDER_WAY_MAX:
            self._begun.clear()
        pairs = _pairs(output) if tokens >= _TOKENS_MIN else 0.0
        self._begun.append((time.perf_counter(), tokens, pairs))

    def end(self) -> tuple[int, float, float] | None:
        """(tokens, pairs of a token and one it attends to, seconds) of the step that has ended, if it says anything."""
        now = time.perf_counter()
        begun, tokens, pairs = self._begun.popleft() if self._begun else (now, 0, 0.0)
        seconds = now - max(begun, self._last_end)
        self._last_end = now
        return (tokens, pairs, seconds) if tokens >= _TOKENS_MIN else None

    def clear(self) -> None:
        """Nothing is under way any more."""
        self._begun.clear()


def _pairs(output: SchedulerOutput) -> float:
    scheduled = output.num_scheduled_tokens
    pairs = 0.0
    for new in output.scheduled_new_reqs:
        count = scheduled.get(new.req_id, 0)
        pairs += count * (new.num_computed_tokens + (count + 1) / 2)
    cached = output.scheduled_cached_reqs
    for i, request_id in enumerate(cached.req_ids):
        count = scheduled.get(request_id, 0)
        pairs += count * (cached.num_computed_tokens[i] + (count + 1) / 2)
    return pairs
