"""The linker for SGLang's external KV stores, under SGLang's own prefix cache and pools, with a real node."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
sys.path.append(str(Path(__file__).parents[1] / "e2e" / "sglang_cpu"))  # what SGLang takes from CUDA even on CPUs
pytest.importorskip("sglang.srt.mem_cache.unified_radix_cache", reason="SGLang is not installed", exc_type=ImportError)
pytest.importorskip("flexkv._core")

import torch  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer  # noqa: E402
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


def test_an_offload_that_fails_halfway_is_waited_for(server_args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang may overwrite the pages once it is told of the end."""
    with opened(server_args) as cache:
        store = cache.linker._stores["kv"]

        class Unarmed:
            """As if the agent could not be told."""

            def arm_saves(self, jobs: list[int], stream: int) -> None:
                raise RuntimeError(f"no {jobs}")

        agent = store.agent
        monkeypatch.setattr(store, "agent", Unarmed())
        prompt = tokens(4 * PAGE)
        with pytest.raises(AssertionError, match="an offload does not end"):
            cache.run(prompt, patience=0.5)
        monkeypatch.setattr(store, "agent", agent)
        cache.flush()
        assert cache.run(prompt) == (0, 0)


@pytest.mark.parametrize("kind", ["mha", "mla", "swa", "mamba", "mamba-mha"])
def test_what_was_flushed_is_loaded_layer_by_layer(server_args: Any, kind: str) -> None:
    prompt = tokens(20 * PAGE)
    with opened(server_args, kind=kind) as cache:
        assert cache.run(prompt) == (0, 0)
        assert cache.run(prompt) == (20 * PAGE, 0)
        cache.flush()
        assert cache.run(prompt) == (0, 20 * PAGE)


@pytest.mark.parametrize("kind", ["mamba", "mamba-mha"])
def test_with_states_a_prompt_is_loaded_up_to_the_last_state(server_args: Any, kind: str) -> None:
    """SGLang's cache has a state at the end of what it was given."""
    system, one, other = tokens(6 * PAGE), tokens(5 * PAGE, seed=1), tokens(4 * PAGE, seed=2)
    with opened(server_args, kind=kind) as cache:
        cache.run(system + one)
        cache.flush()
        assert cache.run(system + other) == (0, 0)  # attention has six pages, no state is there
        cache.flush()
        assert cache.run(system) == (0, 0)  # its state is kept from now on
        cache.flush()
        assert cache.run(system + other[: 2 * PAGE]) == (0, len(system))
        cache.flush()
        assert cache.run(system + one) == (0, len(system + one))
        cache.flush()
        assert cache.run(system) == (0, len(system))
        assert cache.run(system + other) == (len(system), len(other))


def test_states_are_copied_while_a_forward_follows_loads_and_while_none_does(server_args: Any) -> None:
    """As for a request that goes on from a state in SGLang's cache: SGLang asks the counter whether there is a load."""
    with opened(server_args, kind="mamba") as cache:
        counter = cache.linker.layer_done_counter
        followed = []

        def between(step: str) -> None:
            followed.append(counter.consumer_index >= 0)
            cache.rows.copy_mamba_state(torch.tensor([1]), torch.tensor([2]))

        cache.run(tokens(4 * PAGE), between=between)
        assert not any(followed)
        cache.flush()
        cache.run(tokens(4 * PAGE), between=between)
        assert any(followed)


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
        (space,) = json.loads(cache.linker._node.node.status())["spaces"]
        assert space["used"] == 15


def test_only_prefixes_whose_window_is_kept_are_promised(server_args: Any) -> None:
    keys = [hashlib.sha256(bytes([number])).hexdigest() for number in range(10)]
    with opened(server_args, kind="swa") as cache:
        slots = cache._alloc(10 * PAGE)
        windowed = cache.allocator.translate_loc_from_full_to_swa(slots)

        def transfer(pool: PoolName, indices: torch.Tensor, first: int, end: int) -> PoolTransfer:
            return PoolTransfer(pool, device_indices=indices[first * PAGE : end * PAGE], keys=keys[first:end])

        for first, window, end in ((0, 4, 6), (6, 8, 10)):
            both = [transfer(PoolName.KV, slots, first, end), transfer(PoolName.SWA, windowed, window, end)]
            assert cache.linker.offload(both)
        deadline = time.monotonic() + 60
        while cache.linker.num_completed_offloads() < 2:
            assert time.monotonic() < deadline
        assert cache.linker.pop_completed_offload() and cache.linker.pop_completed_offload()
        wanted = [PoolTransfer(PoolName.KV, keys=keys), PoolTransfer(PoolName.SWA, keys=keys[8:])]
        assert cache.linker.lookup("request", wanted) == [6, 10]


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
                assert not cache.linker.finish_layer_wise_loading(-1)
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
    [
        ({"nnodes": 2}, {}, "several machines"),
        ({"enable_memory_saver": True}, {}, "memory-saver"),
        ({}, {"pp_size": 2}, "pipeline"),
        ({}, {"mtp_draft_device_pools": (1,)}, "draft"),
    ],
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
