"""What the scheduler side remembers of each request: how far its blocks are known, and whether they may be kept."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

from flexkv.integration.common.saves import Offers
from flexkv.integration.vllm import identity

if TYPE_CHECKING:
    from vllm.v1.request import Request

_BOUNDARY_SECONDS = 1.0


class Chain:
    """A request's blocks in one group. Block numbers count from the start of the prompt."""

    __slots__ = ("block_ids", "heads", "offers", "sequence", "tail_asked", "tail_end")

    def __init__(self, sequence: int, heads: int = 0) -> None:
        """`heads`: of a group of tails, a sequence to look for them with."""
        self.sequence = sequence
        self.heads = heads
        self.tail_end = 0  # the block before which the tail ends that the sequence is
        self.tail_asked = (0, 0)  # the tokens between which it was found to be the last one
        # As the engine said it. Blocks that it has given back since are not taken out: see Group.first_live.
        self.block_ids: list[int] = []
        self.offers = Offers()


class Tracked:
    """A request as far as the cache is concerned."""

    __slots__ = (
        "_adapter",
        "_adapter_hashes",
        "_boundary",
        "chains",
        "load_async",
        "loaded_in_life",
        "local_tokens",
        "outdated",
        "parked",
        "request",
        "save",
        "tainted",
    )

    def __init__(self, request: Request, chains: list[Chain], save: bool) -> None:
        self.request = request
        self.chains = chains
        self.local_tokens = 0  # in the engine's own cache at the last lookup
        self.loaded_in_life = -1  # number of preemptions when a load was last ordered
        self.outdated = False  # its blocks were computed before a reset
        self.load_async = False  # what the engine was told at the last lookup
        self.parked = False  # waits for its load: nobody else has the blocks that are filled
        self.save = save
        self.tainted = False  # computes from blocks that a failed load left
        self._adapter = identity.adapter_stamp(getattr(request, "lora_request", None))
        self._adapter_hashes: list[bytes] = []
        self._boundary = (0, 0, 0, 0.0)

    def boundary_limit(self, begin: int, served: int) -> int:
        """No prefix of more than so many of `served` tokens had its states and tails a moment ago, when it was last looked
        for: a request that waits is asked in every step, and looking for them all takes a question for each."""
        asked = self._boundary
        return asked[2] if asked[:2] == (begin, served) and time.monotonic() < asked[3] else served

    def remember_boundary(self, begin: int, served: int, kept: int) -> None:
        if self._boundary[:2] != (begin, served) or time.monotonic() >= self._boundary[3]:
            self._boundary = (begin, served, kept, time.monotonic() + _BOUNDARY_SECONDS)

    def block_hashes(self) -> list[bytes]:
        """vLLM's, and where there is an adapter, of its weights, too."""
        hashes = self.request.block_hashes
        if not self._adapter:
            return hashes
        known = self._adapter_hashes
        known.extend(hashlib.sha256(self._adapter + hash_).digest() for hash_ in hashes[len(known) :])
        return known
