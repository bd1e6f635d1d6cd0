"""The documentation says what the tests show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT / "tests/e2e"))

from features import named_tests, tables


def test_vllm_page_has_the_tables() -> None:
    page = (_ROOT / "docs/engines/vllm.md").read_text()
    for line in tables().splitlines():
        assert line in page, "print them anew: python tests/e2e/features.py"


@pytest.mark.parametrize("name", sorted(named_tests()))
def test_named_tests_exist(name: str) -> None:
    file, _, test = name.partition("::")
    source = (_ROOT / "tests/e2e" / file).read_text()
    assert f"def {test}(" in source if test else "def test_" in source
