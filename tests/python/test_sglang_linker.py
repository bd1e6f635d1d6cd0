"""The linker for SGLang's external KV stores, under SGLang's own prefix cache and pools, with a real node and agents."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
sys.path.append(str(Path(__file__).parents[1] / "e2e" / "sglang_cpu"))  # what SGLang takes from CUDA even on CPUs
pytest.importorskip("sglang.srt.mem_cache.unified_radix_cache", reason="SGLang is not installed", exc_type=ImportError)
pytest.importorskip("flexkv._core")

from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler  # noqa: E402
from sglang_cache import PAGE, Cache, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("clean_environment")

LINKER = {"linker": "FlexKVLinker", "linker_module_path": "flexkv.integration.sglang.linker"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flexkv.demo.model import TINY_SHAPE, make_model

    return make_model(tmp_path_factory.mktemp("model"), TINY_SHAPE)


@pytest.fixture(scope="module")
def server_args(model: Path) -> Any:
    args = ServerArgs(
        model_path=str(model),
        device="cpu",
        attention_backend="torch_native",
        page_size=PAGE,
        disable_cuda_graph=True,
        enable_unified_cache_external_linker=True,
        unified_cache_external_linker_backend="dynamic",
        unified_cache_external_linker_config=LINKER | {"linker_extra_config": {"cpu_cache_gb": "16MB"}},
    )
    set_global_server_args_for_scheduler(args)
    return args


@contextlib.contextmanager
def opened(server_args: Any, **more: Any) -> Iterator[Cache]:
    cache = Cache(server_args, **more)
    try:
        yield cache
    finally:
        cache.close()


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_what_was_flushed_is_loaded_layer_by_layer(server_args: Any, mla: bool) -> None:
    prompt = tokens(20 * PAGE)
    with opened(server_args, mla=mla) as cache:
        assert cache.run(prompt) == (0, 0)
        assert cache.run(prompt) == (20 * PAGE, 0)
        cache.flush()
        assert cache.run(prompt) == (0, 20 * PAGE)


def test_pages_behind_any_device_hit_are_found(server_args: Any) -> None:
    """SGLang asks for the pages behind what the device holds, wherever that ends."""
    system, one, other = tokens(6 * PAGE), tokens(5 * PAGE, seed=1), tokens(4 * PAGE, seed=2)
    with opened(server_args) as cache:
        cache.run(system + one)  # one chain
        cache.run(system + other)  # its tail only: the beginning is on the device
        cache.flush()
        assert cache.run(system) == (0, len(system))
        assert cache.run(system + one) == (len(system), len(one))  # from the middle of what was kept as one
        assert cache.run(system + other) == (len(system), len(other))
        cache.flush()
        assert cache.run(system + other) == (0, len(system + other))  # across pieces that were kept apart
        assert cache.run(system + one + other) == (len(system), len(one))
        cache.flush()
        assert cache.run(system + one + other) == (0, len(system + one + other))


def test_nothing_is_kept_twice(server_args: Any) -> None:
    system, one, other = tokens(6 * PAGE), tokens(5 * PAGE, seed=1), tokens(4 * PAGE, seed=2)
    with opened(server_args) as cache:
        cache.run(system + one)
        cache.run(system + other)
        for prompt in (system + other, system + one, system + other):
            cache.flush()
            cache.run(prompt)
        status = json.loads(cache.linker._node.node.status())
        (model,) = json.loads(cache.linker._node.node.status())["models"]
        assert model["used"] == 15


def test_salts_and_adapters_share_nothing(server_args: Any) -> None:
    prompt = tokens(8 * PAGE)
    names = [{}, {"salt": "a"}, {"salt": "b"}, {"extra_key": "lora-1"}, {"salt": "a", "extra_key": "lora-1"}]
    with opened(server_args) as cache:
        for name in names:
            assert cache.run(prompt, **name) == (0, 0)
            cache.flush()
        for name in names:
            assert cache.run(prompt, **name) == (0, 8 * PAGE)


def test_an_engine_that_starts_again_finds_at_the_daemon_what_the_one_before_kept(
    server_args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexkv import _core

    node = _core.Node({"pool_bytes": 16 << 20})
    node.listen(os.environ["FLEXKV_RUNTIME_DIR"], "default")
    monkeypatch.setenv("FLEXKV_NODE", "default")
    system, one, other = tokens(6 * PAGE), tokens(5 * PAGE, seed=1), tokens(4 * PAGE, seed=2)
    with opened(server_args) as cache:
        cache.run(system + one)
        cache.run(system + other)
    with opened(server_args) as cache:
        assert cache.run(system + other) == (0, len(system + other))
        assert cache.run(system + one) == (len(system), 0)  # kept behind `system`, of which this engine does not know
        cache.flush()
        assert cache.run(system + one) == (0, len(system + one))
    node.stop()


def test_a_load_whose_node_goes_away_fails_and_aborts_only_its_request(
    server_args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexkv import _core

    node = _core.Node({"pool_bytes": 16 << 20})
    node.listen(os.environ["FLEXKV_RUNTIME_DIR"], "default")
    monkeypatch.setenv("FLEXKV_NODE", "default")
    prompt = tokens(8 * PAGE)
    steps = []

    def between(step: str) -> None:
        steps.append(step)
        if step == "ordered":
            node.stop()

    with opened(server_args) as cache:
        cache.run(prompt)
        cache.flush()
        assert cache.run(prompt, between=between) == (0, 0)
        assert steps == ["matched", "ordered", "failed", "inserted"]
        cache.flush()
        assert cache.run(prompt) == (0, 0)  # and goes on without a node


def test_a_queued_load_that_is_canceled_writes_nothing(server_args: Any) -> None:
    prompt = tokens(8 * PAGE)
    with opened(server_args) as cache:
        cache.run(prompt)
        cache.flush()

        def cancel(step: str) -> None:
            if step == "ordered":
                cache.cache.linker.release_request("request-1")
                assert cache.linker.start_layer_wise_loading() == -1
                raise InterruptedError

        with pytest.raises(InterruptedError):
            cache.run(prompt, between=cancel)
        assert not any(bool(tensor.any()) for tensor in cache.linker.pools["kv"].kv_buffer)
        cache.flush()
        assert cache.run(prompt) == (0, 8 * PAGE)


def test_a_pool_that_is_too_small_evicts_and_stays_right(server_args: Any) -> None:
    prompts = [tokens(30 * PAGE, seed) for seed in range(4)]
    with opened(server_args, slots=50 * PAGE) as cache:
        loaded = 0
        for _ in range(3):
            for prompt in prompts:
                cache.evict(30 * PAGE)
                loaded += cache.run(prompt)[1]
        assert loaded > 0


@pytest.mark.parametrize(
    ("arguments", "params", "said"),
    [({"nnodes": 2}, {}, "several machines"), ({}, {"pp_size": 2}, "pipeline"), ({}, {"mtp_draft_device_pools": (1,)}, "draft")],
)
def test_what_the_door_cannot_do_is_refused(
    server_args: Any, arguments: dict[str, Any], params: dict[str, Any], said: str
) -> None:
    from flexkv.integration.sglang.linker import _refuse
    from flexkv.integration.sglang.pools import device_pools

    with opened(server_args) as cache:
        told = dataclasses.replace(cache.params, **params)
        with pytest.raises(ValueError, match=said):
            _refuse(SimpleNamespace(**arguments), told)
            device_pools(told, set(cache.cache.components))


def test_a_setting_that_does_not_exist_is_told(server_args: Any) -> None:
    from flexkv.config import ConfigError
    from flexkv.integration.sglang.linker import _settings

    with pytest.raises(ConfigError, match="linker_extra_config"):
        _settings({"cpu_cache_gbb": 1})
