"""Saves that run beside the engine's steps: who reads which device block, and when to offer again what was refused."""

from __future__ import annotations

import itertools
from typing import NamedTuple

# Each KV cache group numbers its jobs for itself.
Job = tuple[int, int]  # group, id

# From so many blocks on, a save is looked at by itself: the first step of a long prompt must not enter them one by one.
_LARGE_SAVE_BLOCKS = 256
# A request whose saves keep being refused offers them again after 1, 2, 4, ... steps, at last after so many.
_RETRY_STEPS_MAX = 1024


class Offers:
    """How far a request's chain of blocks was offered to be saved."""

    __slots__ = ("_not_before", "_refusals", "offered")

    def __init__(self) -> None:
        self.offered = 0  # leading blocks that are kept or were ordered to be saved
        self._refusals = 0
        self._not_before = 0

    def restart(self, kept: int) -> None:
        """The request begins (anew), and so many leading blocks are kept."""
        self.offered = kept
        self._refusals = self._not_before = 0

    def due(self, step: int) -> bool:
        return step >= self._not_before

    def refused(self, first: int, step: int, from_start: bool = False) -> None:
        """Blocks from `first` on were not kept; `from_start`: nor, perhaps, those before them. Refusals of what was
        ordered before an earlier one was known count as the same."""
        if first < self.offered:
            self.offered = 0 if from_start else first
        if step >= self._not_before:
            self._not_before = step + min(1 << self._refusals, _RETRY_STEPS_MAX)
            self._refusals = min(self._refusals + 1, _RETRY_STEPS_MAX.bit_length())

    def kept(self) -> None:
        self._refusals = 0


class Save(NamedTuple):
    offers: Offers
    first: int
    block_ids: list[int]


class RunningSaves:
    """Saves that may still read device blocks, by job and by block."""

    def __init__(self) -> None:
        self._saves: dict[Job, Save] = {}
        # Nothing of them is kept whatever they read, which they may still do for a moment.
        self._called_off: set[Job] = set()
        self._by_block: dict[int, Job] = {}
        # Few: large ones, and those with a block that another one reads already (a prefix in the engine's own cache
        # belongs to every request that shares it).
        self._apart: dict[Job, frozenset[int]] = {}

    def __len__(self) -> int:
        return len(self._saves)

    def add(self, job: Job, save: Save) -> None:
        self._saves[job] = save
        if len(save.block_ids) < _LARGE_SAVE_BLOCKS and self._by_block.keys().isdisjoint(save.block_ids):
            self._by_block.update(dict.fromkeys(save.block_ids, job))
        else:
            self._apart[job] = frozenset(save.block_ids)

    def add_readers(self, block_ids: list[int], jobs: set[Job]) -> None:
        """Adds to `jobs` the saves that read any of the blocks."""
        if self._by_block and not self._by_block.keys().isdisjoint(block_ids):
            jobs.update(self._by_block[block] for block in block_ids if block in self._by_block)
        for job, read in self._apart.items():
            if not read.isdisjoint(block_ids):
                jobs.add(job)

    def end(self, job: Job) -> Save | None:
        """The save reads nothing any more; None if it is not one of ours, or was called off."""
        self._called_off.discard(job)
        return self._forget(job)

    def call_off(self, job: Job) -> Save | None:
        """The node has been told to keep nothing of the save."""
        if (save := self._forget(job)) is not None:
            self._called_off.add(job)
        return save

    def call_off_all(self) -> list[Job]:
        """Returns the jobs that the node is to be told of."""
        jobs = list(self._saves)
        self._called_off.update(jobs)
        self._saves.clear()
        self._by_block.clear()
        self._apart.clear()
        return jobs

    def reading(self) -> Job | None:
        """One that may still read device memory, if there is any."""
        return next(itertools.chain(self._called_off, self._saves), None)

    def node_lost(self, group: int) -> None:
        """How those of this group that were called off ended, nobody is going to say."""
        self._called_off = {job for job in self._called_off if job[0] != group}

    def _forget(self, job: Job) -> Save | None:
        save = self._saves.pop(job, None)
        if save is not None and self._apart.pop(job, None) is None:
            for block in save.block_ids:
                self._by_block.pop(block, None)
        return save
