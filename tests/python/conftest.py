"""Tests run against the installed package, or against the sources where none is installed."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("flexkv") is None or importlib.util.find_spec("flexkv.config") is None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "python"))


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting from outside, and a runtime directory of the test's own."""
    for name in list(os.environ):
        if "FLEXKV" in name or name.startswith("DYN_KVBM_"):
            monkeypatch.delenv(name)
    runtime_dir = tmp_path / "run"
    runtime_dir.mkdir(mode=0o700)
    monkeypatch.setenv("FLEXKV_RUNTIME_DIR", str(runtime_dir))
