"""Speculative decoding: only what the model has confirmed is kept. Drafts come from the text so far (n-grams), as that runs
on CPUs; each run rejects many and accepts some, across block boundaries."""

from __future__ import annotations

import pytest
from conftest import RunBoth, Runs
from engine import BLOCK, EngineConfig
from scenarios import Step, emptied, generate, prompt, whole_blocks

_DRAFTS = 7
_NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": _DRAFTS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
_CONFIG = EngineConfig(flexkv=True, full=True, pool_blocks=110, more=(("speculative_config", _NGRAM),))
_ANSWER = 2 * BLOCK + 5


def _prompts() -> list[list[int]]:
    """Few different tokens, so that drafts are found all the time; of lengths that put a block's end at several of them."""
    return [[5 + token % 24 for token in prompt(f"drafts {i}", 3 * BLOCK - _DRAFTS + i)] for i in range(3)]


def _steps() -> list[Step]:
    more = [prompt(f"more {i}", 5) for i in range(3)]
    return [
        generate("cold", _prompts(), max_tokens=_ANSWER),
        *emptied(),
        generate("warm", _prompts(), max_tokens=_ANSWER),
        *emptied(),
        generate("goes on", more, max_tokens=_ANSWER, after="warm"),
        *emptied(),
        generate("goes on again", more, max_tokens=_ANSWER, after="warm"),
    ]


@pytest.fixture(scope="module")
def runs(run_both: RunBoth) -> Runs:
    return run_both(_CONFIG, _steps())


def test_drafts_are_rejected_and_accepted(runs: Runs) -> None:
    for name, result in runs.flexkv.items():
        assert 0 < result.accepted < result.drafted, name


def test_outputs_are_equal(runs: Runs) -> None:
    for name in runs.baseline:
        assert runs.flexkv[name].outputs == runs.baseline[name].outputs, name


def test_prompts_and_confirmed_answers_are_found_to_the_last_block(runs: Runs) -> None:
    assert runs.flexkv["cold"].flexkv_hits == 0
    assert runs.flexkv["warm"].flexkv_hits == sum(whole_blocks(len(p)) for p in _prompts())
    # Of each answer the last token was never computed, so at most its last block is missing.
    said = [len(p) + _ANSWER for p in _prompts()]
    assert runs.flexkv["goes on"].flexkv_hits >= sum((length - 1) // BLOCK * BLOCK for length in said)
    assert runs.flexkv["goes on again"].flexkv_hits >= runs.flexkv["goes on"].flexkv_hits
