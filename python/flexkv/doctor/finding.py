"""What a check found, and what to do about it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Verdict(enum.Enum):
    OK = "ok"
    BETTER = "could be better"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """One line of `flexkv doctor`."""

    looked_at: str
    found: str
    verdict: Verdict = Verdict.OK
    advice: str = ""  # empty: nothing to do
    figures: Mapping[str, float] | None = None  # what was measured, for programs


def better(looked_at: str, found: str, advice: str, figures: Mapping[str, float] | None = None) -> Finding:
    """It works, and could work better."""
    return Finding(looked_at, found, Verdict.BETTER, advice, figures)


def wrong(looked_at: str, found: str, advice: str, figures: Mapping[str, float] | None = None) -> Finding:
    """FlexKV does not work, or not as configured, until this is changed."""
    return Finding(looked_at, found, Verdict.WRONG, advice, figures)
