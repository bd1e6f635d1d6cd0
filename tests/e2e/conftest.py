"""What the end-to-end tests share: the tiny model, the adapters, and each engine's run, once a session."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from engine import EngineConfig, Results, run_engine


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "a directory that several pytest share: each file's tests run in the one that comes to it first"
    parser.addoption("--claims", type=Path, help=what)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """True: another pytest runs it."""
    claims = item.config.getoption("claims")
    return True if claims is not None and not _claimed(claims / item.path.stem) else None


@functools.cache
def _claimed(claim: Path) -> bool:
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flexkv.demo.model import TINY_SHAPE, make_model

    return make_model(tmp_path_factory.mktemp("model"), TINY_SHAPE)


@pytest.fixture(scope="session")
def hybrid_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flexkv.demo.model import TINY_HYBRID_SHAPE, make_model

    return make_model(tmp_path_factory.mktemp("hybrid"), TINY_HYBRID_SHAPE)


@pytest.fixture(scope="session")
def lora_adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from flexkv.demo.model import TINY_SHAPE, make_lora

    directory = tmp_path_factory.mktemp("lora")
    return {name: make_lora(directory / name, TINY_SHAPE, seed) for seed, name in enumerate(("A", "B"), start=7)}


@dataclasses.dataclass(frozen=True)
class Runs:
    """The same steps through one configuration of the engine, without FlexKV and with it."""

    baseline: Results
    flexkv: Results


RunBoth = Callable[[EngineConfig, list[dict[str, Any]]], Runs]


@pytest.fixture(scope="session")
def run_both(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunBoth:
    """Runs steps without and with FlexKV; a configuration that failed fails its other tests at once, without a new run."""
    done: dict[tuple[str, str], Results | BaseException] = {}

    def once(config: EngineConfig, steps: list[dict[str, Any]]) -> Results:
        key = (repr(config), repr(steps))
        if key not in done:
            directory = tmp_path_factory.mktemp(re.sub(r"\W+", "_", config.name)) / "engine"
            try:
                done[key] = run_engine(config, tiny_model, steps, directory)
            except AssertionError as failure:
                done[key] = failure
        outcome = done[key]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def both(config: EngineConfig, steps: list[dict[str, Any]]) -> Runs:
        return Runs(
            baseline=once(dataclasses.replace(config, flexkv=False, full=False, environment=()), steps),
            flexkv=once(config, steps),
        )

    return both
