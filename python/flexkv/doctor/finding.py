"""What a check found, and what to do about it."""

from __future__ import annotations

import enum
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


def better(looked_at: str, found: str, advice: str) -> Finding:
    """It works, and could work better."""
    return Finding(looked_at, found, Verdict.BETTER, advice)


def wrong(looked_at: str, found: str, advice: str) -> Finding:
    """FlexKV does not work, or not as configured, until this is changed."""
    return Finding(looked_at, found, Verdict.WRONG, advice)
