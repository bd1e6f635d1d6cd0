"""The demo's workload: conversations that take turns, each turn's prompt holding the whole conversation before it.

Turn 1 of every conversation runs first, then turn 2 of every conversation, and so on, one request at a time. The engine's
own cache holds little more than the longest prompt, so the other conversations push a conversation's blocks out before
its next turn: what the engine finds again is at most a little, what FlexKV finds is everything up to the last turn.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Protocol

_TEXT = (
    "the cache of keys and values grows with every token that an answer reads so long prompts cost seconds before "
    "their first word appears while copying what was computed earlier takes only a moment from memory to memory "
    "therefore keep it share it bring it back in time check each byte and never serve a wrong one"
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Lengths in tokens. A turn adds `turn_tokens` of question and `answer_tokens` of answer to its conversation."""

    conversations: int = 4
    turns: int = 4
    first_tokens: int = 2048
    turn_tokens: int = 256
    answer_tokens: int = 16
    block_size: int = 32
    seed: int = 1

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt together with its answer."""
        return self.first_tokens + (self.turns - 1) * (self.turn_tokens + self.answer_tokens) + self.answer_tokens

    @property
    def engine_blocks(self) -> int:
        """Room for the longest prompt in the engine, and hardly more: one spare block, and vLLM's null block."""
        return -(-self.longest // self.block_size) + 2

    @property
    def all_tokens(self) -> int:
        """Tokens whose KV a cache needs in order to keep every conversation."""
        return self.conversations * self.longest

    @property
    def requests(self) -> int:
        return self.conversations * self.turns

    def check(self) -> None:
        """Raises ValueError when the engine's own cache could keep a conversation until its next turn."""
        others = (self.conversations - 1) * (self.first_tokens + self.answer_tokens)
        pool = self.engine_blocks * self.block_size
        if others < pool:
            raise ValueError(
                f"the engine needs room for {pool} tokens (the longest prompt), and the other conversations bring only "
                f"{others} between two turns: it could keep prompts on its own. Use more conversations, fewer turns, "
                "or a longer first prompt"
            )


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer. `engine_tokens` and `flexkv_tokens`: prompt tokens not computed, by where their KV came from."""

    tokens: list[int]
    ttft_seconds: float
    engine_tokens: int
    flexkv_tokens: int


@dataclasses.dataclass(frozen=True)
class Request:
    """One request of a run, as reported and saved."""

    conversation: int
    turn: int
    prompt_tokens: int
    tokens: list[int]
    ttft_seconds: float
    engine_tokens: int
    flexkv_tokens: int


class Engine(Protocol):
    def complete(self, prompt: list[int], max_tokens: int) -> Completion: ...


def play(
    workload: Workload, engine: Engine, encode: Callable[[str], list[int]], on_request: Callable[[Request], None]
) -> None:
    """Plays the whole workload against `engine`; greedy answers become part of the next turn's prompt."""
    engine.complete(encode("warm-up, not measured")[: workload.block_size - 1], workload.answer_tokens)
    histories: list[list[int]] = [[] for _ in range(workload.conversations)]
    for turn in range(workload.turns):
        for conversation, history in enumerate(histories):
            history += _question(workload, conversation, turn, encode)
            done = engine.complete(history, workload.answer_tokens)
            on_request(
                Request(conversation=conversation, turn=turn, prompt_tokens=len(history), **dataclasses.asdict(done))
            )
            history += done.tokens


def _question(workload: Workload, conversation: int, turn: int, encode: Callable[[str], list[int]]) -> list[int]:
    wanted = workload.turn_tokens if turn else workload.first_tokens
    generator = random.Random(f"{workload.seed}/{conversation}/{turn}")
    # A token stands for at least one character in any tokenizer, hence a word each is enough.
    return encode(f"[{conversation}.{turn}] " + " ".join(generator.choices(_TEXT.split(), k=wanted)))[:wanted]
