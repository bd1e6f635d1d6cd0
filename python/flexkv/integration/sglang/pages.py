"""The pages of one device pool (or host pool) of SGLang, kept in FlexKV: found, loaded and saved by their hashes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flexkv import _core
from flexkv.config import Settings
from flexkv.integration.sglang.chains import PageChains
from flexkv.integration.sglang.pools import Pool

logger = logging.getLogger("flexkv.sglang")


class Piece(NamedTuple):
    """Pages [at, at + count) of those asked for are blocks [first, first + count) of this chain. Its sequence protects
    them from eviction for a moment (2 s); to be closed."""

    sequence: int
    chain: list[bytes]
    first: int
    at: int
    count: int


@dataclass(frozen=True)
class NodePlace:
    """Where the node is, and as whom the engine speaks to it."""

    runtime_dir: str
    node_name: str
    engine_id: str


class PageStore:
    """One pool's. Owned by one thread; the copies run on threads of their own, without the GIL."""

    def __init__(self, client: Any, agent: Any, pool: Pool, from_drives: bool = False) -> None:
        """`from_drives`: what is on drives only counts as found, and a load of it takes as long as they do."""
        self._from_drives = from_drives
        self.pool = pool
        self.client = client
        self.agent = agent
        self._chains = PageChains()

    # ---- which pages are kept

    def find(self, pages: Sequence[bytes]) -> tuple[int, list[Piece]]:
        """How many leading pages can be loaded, and where they are. What is on drives only is fetched meanwhile."""
        pieces = []
        at = 0
        while at < len(pages) and (piece := self._look_up(pages, at)) is not None:
            pieces.append(piece)
            at += piece.count
        return at, pieces

    def find_scattered(self, pages: Sequence[bytes]) -> tuple[set[int], list[Piece]]:
        """The numbers of all the pages that can be loaded."""
        found: set[int] = set()
        pieces = []
        at = 0
        while at < len(pages):
            piece = self._look_up(pages, at)
            if piece is None:
                at += 1
                continue
            pieces.append(piece)
            found.update(range(at, at + piece.count))
            at += piece.count
        return found, pieces

    def find_alone(self, pages: Sequence[bytes]) -> tuple[set[int], list[Piece]]:
        """The same of pages that were saved one by one, and of which few are kept: each that is found costs a question, the
        others nothing."""
        found: set[int] = set()
        pieces = []
        end = len(pages)
        fetching = False  # one: no more are used
        while end > 0:
            sequence = self.client.open_sequence()
            end, _, from_drives = self.client.lookup_last(sequence, pages[:end])
            if end > 0 and (from_drives == 0 or self._from_drives):
                pieces.append(Piece(sequence, [pages[end - 1]], 0, end - 1, 1))
                found.add(end - 1)
            else:
                if end > 0 and not fetching:
                    fetching = True
                    self.client.prefetch(sequence, [pages[end - 1]])
                self.client.close_sequence(sequence)
            end -= 1
        return found, pieces

    def _look_up(self, pages: Sequence[bytes], at: int) -> Piece | None:
        before = self._chains.before(pages[at])
        # What was kept behind others once may be kept by itself now.
        for prefix in (before, []) if before else ([],):
            chain = [*prefix, *pages[at:]]
            sequence = self.client.open_sequence()
            first = len(prefix)
            kept = self._kept(sequence, chain, first)
            if kept > first:
                if chain[kept - 1] not in self._chains:
                    self._chains.add(chain[:kept], 0)
                return Piece(sequence, chain, first, at, kept - first)
            self.client.close_sequence(sequence)
        return None

    def _kept(self, sequence: int, chain: list[bytes], first: int) -> int:
        """Of the chain; those before `first` are not asked for."""
        if self._from_drives:
            return self.client.lookup(sequence, chain, first)[0]
        in_host, anywhere = self.client.lookup_in_host_memory(sequence, chain, first)
        if anywhere > in_host:
            self.client.prefetch(sequence, chain)
        return in_host

    def close(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self.client.close_sequence(piece.sequence)

    # ---- transfers: the jobs are to be armed at the agent

    def load(self, pieces: Sequence[Piece], blocks: Sequence[int]) -> list[int]:
        """Of pages found into these device blocks, one for each page; the first so many, if the blocks are fewer."""
        jobs = []
        for piece in pieces:
            to = list(blocks[piece.at : piece.at + piece.count])
            if to:
                jobs.append(self.client.load(piece.sequence, piece.first, to))
        return jobs

    def save(self, pages: Sequence[bytes], blocks: Sequence[int]) -> tuple[list[int], bool]:
        """What is not kept of the pages in these device blocks. False: there is no node to save some of them to."""
        jobs = []
        reached = True
        chain: list[bytes] = []  # that ends before page `at`
        at = 0
        while at < len(pages):
            piece = self._look_up(pages, at)
            if piece is not None:
                self.close([piece])
                chain = piece.chain[: piece.first + piece.count]
                at += piece.count
                continue
            end = at + 1
            while end < len(pages) and pages[end] not in self._chains:
                end += 1
            first = len(chain)
            chain = [*chain, *pages[at:end]]
            sequence = self.client.open_sequence()
            job = self.client.save(sequence, chain, first, list(blocks[at:end]))
            self.client.close_sequence(sequence)
            if job:
                jobs.append(job)
                self._chains.add(chain, first)
            else:
                reached = False
            at = end
        return jobs, reached

    def stop(self) -> None:
        """On return nothing touches the pool."""
        self.agent.stop()


def open_agent(place: NodePlace, pool: Pool, settings: Settings) -> Any:
    """The copies between a pool and the node."""
    options = {
        "runtime_dir": place.runtime_dir,
        "node_name": place.node_name,
        "engine_id": place.engine_id,
        "rank": 0,
        "rank_count": 1,
        "load_timeout_ms": settings.load_timeout_ms,
        "save_timeout_ms": settings.save_timeout_ms,
        "gpu_stage_below_bytes": settings.gpu_stage_below_bytes,
        "log_level": settings.log_level,
    }
    agent = _core.RankAgent(options, pool.tensors, pool.block_count, pool.device)
    for line in agent.layout().splitlines():
        logger.info("FlexKV: pool '%s' on %s, %d blocks: %s", pool.name, pool.device, pool.block_count, line)
    return agent
