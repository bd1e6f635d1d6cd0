"""The documentation says what the tests show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT / "tests/e2e"))

import acceptance
import features

_IN_CI = {test for row in acceptance.ROWS for test in row.in_ci}
_WITH_NIXL = {test for row in acceptance.ROWS for test in row.with_nixl}


def test_pages_have_the_tables() -> None:
    for page, printed in (("vllm.md", features), ("README.md", acceptance)):
        text = (_ROOT / "docs/engines" / page).read_text()
        for line in printed.table().splitlines():
            assert line in text, f"print it anew: python {printed.__file__}"


@pytest.mark.parametrize("name", sorted({f"e2e/{test}" for test in features.named_tests()} | _IN_CI | _WITH_NIXL))
def test_named_tests_exist(name: str) -> None:
    source, test = _source(name), name.partition("::")[2]
    assert f"def {test}(" in source if test else "def test_" in source


def test_named_tests_run_where_the_table_says() -> None:
    for name in _IN_CI | _WITH_NIXL:
        assert (name in _WITH_NIXL) == ("DYNAMO_DISAGGREGATED" in _source(name)), name


def _source(name: str) -> str:
    return (_ROOT / "tests" / name.partition("::")[0]).read_text()
