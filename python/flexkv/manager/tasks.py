"""The tasks of a manager: matched, launched, ended. Bounded however its caller treats them."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from flexkv.manager.requests import KVResponse, KVResponseStatus

# What was matched and neither launched nor canceled: SGLang drops such tasks without a word.
_MATCHED_BLOCKS_MAX = 1 << 20
# Of these tasks, the newest hold their blocks against eviction (for as long as the node's lease lasts).
_SEQUENCES_MAX = 512
_ENDED_MAX = 65536


class Span(NamedTuple):
    """Tokens [first, end) of so many."""

    token_count: int
    first: int
    end: int

    def mask(self) -> np.ndarray:
        mask = np.zeros(self.token_count, dtype=np.bool_)
        mask[self.first : self.end] = True
        return mask

    def first_blocks(self, blocks: int, of_blocks: int) -> Span:
        """The tokens of so many of its blocks."""
        return self._replace(end=self.first + (self.end - self.first) * blocks // max(of_blocks, 1))


class Ended(NamedTuple):
    """A response that nobody has taken. Small: many callers never take those of lookups without a hit."""

    status: KVResponseStatus
    reason: str
    spans: Span | list[Span]  # a list: of a batch


@dataclass(eq=False, slots=True)
class Task:
    """Blocks [first_block, first_block + block_count) of a chain of blocks that is going to be moved."""

    id: int
    save: bool
    hashes: Any  # _core.TokenHashes
    first_block: int
    block_count: int
    span: Span
    sequence: int = 0  # at the node; 0: closed
    job: int = 0
    good_blocks: int = 0  # of a get that has failed: leading ones that were loaded all the same
    batch: Batch | None = None


@dataclass(eq=False, slots=True)
class Batch:
    """Tasks that are waited for as one."""

    id: int
    tasks: list[Task]
    running: int
    status: KVResponseStatus = KVResponseStatus.SUCCESS
    reason: str = ""


@dataclass(slots=True)
class Tasks:
    """Owned by one thread."""

    client: Any
    ids: itertools.count[int]
    matched: OrderedDict[int, Task] = field(default_factory=OrderedDict)
    running: dict[int, Task] = field(default_factory=dict)
    batches: dict[int, Batch] = field(default_factory=dict)
    ended: OrderedDict[int, Ended] = field(default_factory=OrderedDict)
    _by_job: dict[int, Task] = field(default_factory=dict)
    _matched_blocks: int = 0
    _open: OrderedDict[int, Task] = field(default_factory=OrderedDict)

    def add_matched(self, task: Task) -> None:
        self.matched[task.id] = task
        self._matched_blocks += len(task.hashes)
        self._open[task.id] = task
        if len(self._open) > _SEQUENCES_MAX:
            self.close_sequence(next(iter(self._open.values())))
        while self._matched_blocks > _MATCHED_BLOCKS_MAX and len(self.matched) > 1:
            self.take_matched(next(iter(self.matched)), close=True)

    def take_matched(self, task_id: int, *, close: bool = False) -> Task | None:
        task = self.matched.pop(task_id, None)
        if task is not None:
            self._matched_blocks -= len(task.hashes)
            self._open.pop(task_id, None)
            if close:
                self.close_sequence(task)
        return task

    def close_sequence(self, task: Task) -> None:
        self._open.pop(task.id, None)
        if task.sequence:
            self.client.close_sequence(task.sequence)
            task.sequence = 0

    def start(self, task: Task, job: int) -> None:
        task.job = job
        self.running[task.id] = task
        self._by_job[job] = task

    def end(self, task: Task, status: KVResponseStatus, reason: str = "") -> None:
        self.running.pop(task.id, None)
        if status is not KVResponseStatus.SUCCESS:
            task.span = task.span.first_blocks(task.good_blocks, task.block_count)
        batch = task.batch
        if batch is None:
            self._put_ended(task.id, Ended(status, reason, task.span))
            return
        batch.running -= 1
        if status is not KVResponseStatus.SUCCESS:
            batch.status, batch.reason = status, reason
        if batch.running == 0:
            del self.batches[batch.id]
            self._put_ended(batch.id, Ended(batch.status, batch.reason, [one.span for one in batch.tasks]))

    def _put_ended(self, task_id: int, ended: Ended) -> None:
        self.ended[task_id] = ended
        if len(self.ended) > _ENDED_MAX:
            self.ended.popitem(last=False)

    def settle(self) -> None:
        """Takes in what the node has told of running tasks."""
        for job, problem, good_blocks in self.client.take_results():
            task = self._by_job.pop(job, None)
            if task is None:
                continue
            task.good_blocks = good_blocks
            if not problem:
                self.end(task, KVResponseStatus.SUCCESS)
            elif problem == "canceled":
                self.end(task, KVResponseStatus.CANCELLED, problem)
            else:
                self.end(task, KVResponseStatus.FAILED, problem)

    def is_running(self, task_id: int) -> bool:
        return task_id in self.running or task_id in self.batches

    def take(self, task_id: int) -> KVResponse:
        """The response of a task that does not run; an ended one's only once."""
        ended = self.ended.pop(task_id, None)
        if ended is not None:
            spans = ended.spans
            masks = [one.mask() for one in spans] if isinstance(spans, list) else spans.mask()
            return KVResponse(ended.status, task_id, masks, ended.reason)
        unready = task_id in self.matched
        return KVResponse(KVResponseStatus.UNREADY if unready else KVResponseStatus.NOTFOUND, task_id)
