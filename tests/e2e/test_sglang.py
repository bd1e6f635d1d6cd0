"""SGLang, unmodified, on the CPU, through its own --enable-flexkv and through its external linker: real engines, and
outputs that must be equal token by token.

In the environment that scripts/setup --tests makes, or in another one that SGLANG_PYTHON names."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_PYTHON = os.environ.get("SGLANG_PYTHON") or str(Path(sys.prefix) / "sglang/bin/python")
_HERE = Path(__file__).parent
_PATIENCE_SECONDS = 600
pytestmark = pytest.mark.skipif(
    not Path(_PYTHON).is_file(), reason=f"no environment with SGLang at {_PYTHON}: scripts/setup --tests makes it"
)

PROMPTS = [
    [(7 * i * i + 3) % 500 + 5 for i in range(300)],
    [(5 * i * i + 1) % 500 + 5 for i in range(120)],
    [(3 * i * i + i) % 500 + 5 for i in range(45)],
]
PAGE = 16
ALL_PAGES = [(len(prompt) - 1) // PAGE * PAGE for prompt in PROMPTS]  # the last token is always computed
LINKER = {
    "enable_unified_cache_external_linker": True,
    "unified_cache_external_linker_backend": "dynamic",
    "unified_cache_external_linker_config": {
        "linker": "FlexKVLinker",
        "linker_module_path": "flexkv.integration.sglang.linker",
    },
}
ONE_CORE_EACH = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_NCCL_SO_PATH": "/none"}  # NCCL would ask for GPUs


class Engine:
    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ask(self, **step: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(step) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.log
        return json.loads(answer)

    def generate(self, prompts: list[list[int]], **more: Any) -> list[dict[str, Any]]:
        return self.ask(do="generate", prompts=prompts, max_tokens=24, more=more)


@contextlib.contextmanager
def sglang(
    model: Path, directory: Path, arguments: dict[str, Any], environment: dict[str, str] | None = None
) -> Iterator[Engine]:
    directory.mkdir(mode=0o700, exist_ok=True)
    runtime = directory / "run"
    runtime.mkdir(mode=0o700, exist_ok=True)
    everything = {
        **{"model_path": str(model), "device": "cpu", "attention_backend": "torch_native", "dtype": "float32"},
        **{"sampling_backend": "pytorch", "disable_cuda_graph": True, "skip_server_warmup": True, "page_size": PAGE},
        **{"max_total_tokens": 4096, "context_length": 1024, "mem_fraction_static": 0.5, "log_level": "info"},
        **arguments,
    }
    paths = [str(_HERE / "sglang_cpu"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    log = directory / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [_PYTHON, str(_HERE / "sglang_child.py"), json.dumps(everything)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={
                **{name: value for name, value in os.environ.items() if "FLEXKV" not in name},
                **{"PYTHONPATH": os.pathsep.join(paths), "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"},
                **{"HF_HUB_OFFLINE": "1", "FLEXKV_RUNTIME_DIR": str(runtime), "FLEXKV_CPU_CACHE_GB": "64MB"},
                **(environment or {}),
            },
        )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n", log.read_text()
        yield Engine(process, log)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(_PATIENCE_SECONDS)
    finally:
        process.kill()
        process.wait()


def tokens(outputs: list[dict[str, Any]]) -> list[list[int]]:
    return [one["tokens"] for one in outputs]


@pytest.fixture(scope="module")
def baseline(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    with sglang(tiny_model, tmp_path_factory.mktemp("sglang") / "engine", {}) as engine:
        return tokens(engine.generate(PROMPTS))


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_what_was_flushed_from_the_engine_is_loaded_and_gives_the_same_tokens(
    tiny_model: Path, baseline: list[list[int]], tmp_path: Path, overlap: bool
) -> None:
    arguments = {"enable_flexkv": True, "disable_overlap_schedule": not overlap}
    with sglang(tiny_model, tmp_path / "engine", arguments) as engine:
        cold = engine.generate(PROMPTS)
        assert tokens(cold) == baseline and not any(one["cached"] for one in cold)
        assert engine.ask(do="flush")
        warm = engine.generate(PROMPTS)
        assert tokens(warm) == baseline
        assert [one["cached"] for one in warm] == ALL_PAGES


def test_an_engine_whose_pool_is_too_small_evicts_and_loads_and_stays_right(
    tiny_model: Path, baseline: list[list[int]], tmp_path: Path
) -> None:
    arguments = {"enable_flexkv": True, "max_total_tokens": 512, "max_running_requests": 2}
    with sglang(tiny_model, tmp_path / "engine", arguments) as engine:
        loaded = 0
        for _ in range(4):
            for prompt, expected in zip(PROMPTS, baseline, strict=True):
                (output,) = engine.generate([prompt])
                assert output["tokens"] == expected
                loaded += output["cached"]
        assert loaded > 0


def test_two_ranks_keep_and_load_their_shards(tiny_model: Path, baseline: list[list[int]], tmp_path: Path) -> None:
    with sglang(tiny_model, tmp_path / "engine", {"enable_flexkv": True, "tp_size": 2}, ONE_CORE_EACH) as engine:
        assert tokens(engine.generate(PROMPTS)) == baseline
        assert engine.ask(do="flush")
        warm = engine.generate(PROMPTS)
        assert tokens(warm) == baseline
        assert [one["cached"] for one in warm] == ALL_PAGES


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What an engine's environment needs to use it."""
    runtime = tmp_path / "daemon"
    runtime.mkdir(mode=0o700)
    environment = {name: value for name, value in os.environ.items() if "FLEXKV" not in name}
    process = subprocess.Popen(
        [_PYTHON, "-m", "flexkv.cli", "serve", "--name", "shared"],
        env=environment | {"FLEXKV_RUNTIME_DIR": str(runtime), "FLEXKV_CPU_CACHE_GB": "64MB"},
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and b"listens" in process.stdout.readline()
        yield {"FLEXKV_RUNTIME_DIR": str(runtime), "FLEXKV_NODE": "shared"}
    finally:
        process.terminate()
        process.wait(_PATIENCE_SECONDS)


def assert_loads_all(engine: Engine, baseline: list[list[int]]) -> None:
    """A node in another process that does not answer within 50 ms is a miss: on a busy machine ask again."""
    for _ in range(20):
        warm = engine.generate(PROMPTS)
        assert tokens(warm) == baseline
        if [one["cached"] for one in warm] == ALL_PAGES:
            return
        assert engine.ask(do="flush")
    raise AssertionError("pages that were kept are not found")


def test_linked_engines_load_after_a_flush_and_after_a_restart_but_not_what_another_salt_kept(
    tiny_model: Path, baseline: list[list[int]], tmp_path: Path, daemon: dict[str, str]
) -> None:
    with sglang(tiny_model, tmp_path / "first", LINKER, daemon) as engine:
        cold = engine.generate(PROMPTS)
        assert tokens(cold) == baseline and not any(one["cached"] for one in cold)
        assert engine.ask(do="flush")
        assert_loads_all(engine, baseline)
        assert engine.ask(do="flush")
        salted = engine.generate(PROMPTS, cache_salt="another")
        assert tokens(salted) == baseline and not any(one["cached"] for one in salted)
    with sglang(tiny_model, tmp_path / "second", LINKER, daemon) as engine:
        assert_loads_all(engine, baseline)


def test_two_linked_ranks_keep_and_load_their_shards(
    tiny_model: Path, baseline: list[list[int]], tmp_path: Path
) -> None:
    with sglang(tiny_model, tmp_path / "engine", {**LINKER, "tp_size": 2}, ONE_CORE_EACH) as engine:
        assert tokens(engine.generate(PROMPTS)) == baseline
        assert engine.ask(do="flush")
        assert_loads_all(engine, baseline)


@pytest.mark.parametrize("name", ["test_sglang_linker.py", "test_sglang_hicache.py", "test_sglang_layerwise.py"])
def test_under_sglangs_own_classes(name: str) -> None:
    """Those tests want SGLang's modules in their own process."""
    run = subprocess.run(
        [_PYTHON, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(_HERE.parent / "python" / name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
