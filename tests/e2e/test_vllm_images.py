"""Images in prompts: to the engine all of them are the same placeholder tokens; only equal images share KV."""

from __future__ import annotations

import pytest
from conftest import Runs
from engine import BLOCK, EngineConfig, run_engine
from flexkv.demo.model import VOCABULARY
from scenarios import Step, emptied, generate, prompt, whole_blocks
from vision_model import IMAGE_TOKENS, make_vision_model

_CONFIG = EngineConfig(flexkv=True, full=True, pool_blocks=110)
_TEXT = prompt("about the image", 3 * BLOCK)


def _look(name: str, *seeds: int) -> Step:
    return generate(name, [_TEXT for _ in seeds], images=list(seeds))


def _steps() -> list[Step]:
    return [
        _look("one cold", 1),
        *emptied(),
        _look("other cold", 2),
        *emptied(),
        generate("only placeholders", [[VOCABULARY] * IMAGE_TOKENS + _TEXT]),
        *emptied(),
        _look("one warm", 1),
        *emptied(),
        _look("three at once", 1, 2, 3),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("images")
    model = make_vision_model(directory / "model")
    without = EngineConfig(flexkv=False, pool_blocks=_CONFIG.pool_blocks)
    baseline = run_engine(without, model, _steps(), directory / "baseline")
    return Runs(baseline, run_engine(_CONFIG, model, _steps(), directory / "engine"))


def test_images_change_the_output(runs: Runs) -> None:
    names = ("one cold", "other cold", "only placeholders")
    assert len({repr(runs.baseline[name].outputs) for name in names}) == 3


def test_outputs_are_equal(runs: Runs) -> None:
    for name in runs.baseline:
        assert runs.flexkv[name].outputs == runs.baseline[name].outputs, name


def test_equal_placeholders_share_nothing(runs: Runs) -> None:
    for name in ("one cold", "other cold", "only placeholders"):
        assert runs.flexkv[name].flexkv_hits == 0, name


def test_equal_images_are_found(runs: Runs) -> None:
    expected = whole_blocks(IMAGE_TOKENS + len(_TEXT))
    assert runs.flexkv["one warm"].flexkv_hits == expected
    assert runs.flexkv["three at once"].flexkv_hits == 2 * expected
