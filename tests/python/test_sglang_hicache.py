"""HiCache's `dynamic` storage backend, made by SGLang's factory, between SGLang's own host pools and a real node."""

from __future__ import annotations

import contextlib
import os
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
sys.path.append(str(Path(__file__).parents[1] / "e2e" / "sglang_cpu"))  # what SGLang takes from CUDA even on CPUs
pytest.importorskip("sglang.srt.mem_cache.unified_radix_cache", reason="SGLang is not installed", exc_type=ImportError)
pytest.importorskip("flexkv._core")

import torch  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool  # noqa: E402
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402
from sglang.srt.mem_cache.storage import StorageBackendFactory  # noqa: E402
from sglang.srt.mem_cache.utils import get_storage_hash_str  # noqa: E402
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler  # noqa: E402

pytestmark = pytest.mark.usefixtures("clean_environment")

PAGE, LAYERS, TOKENS = 16, 3, 640
BACKEND = {
    "backend_name": "flexkv",
    "module_path": "flexkv.integration.sglang.hicache",
    "class_name": "FlexKVHiCacheStorage",
    "interface_v1": 1,
    "flexkv": {"cpu_cache_gb": "16MB"},
}


@pytest.fixture(scope="module", autouse=True)
def server_args(tmp_path_factory: pytest.TempPathFactory) -> None:
    from flexkv.demo.model import TINY_SHAPE, make_model

    model = make_model(tmp_path_factory.mktemp("model"), TINY_SHAPE)
    arguments = {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True, "page_size": PAGE}
    set_global_server_args_for_scheduler(ServerArgs(model_path=str(model), **arguments))


@pytest.fixture(autouse=True)
def memory_for_small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang leaves 10 GB of the machine's memory to others, whatever a pool takes."""
    monkeypatch.setattr("sglang.srt.mem_cache.pool_host.base.host_memory_budget_bytes", lambda wanted: wanted)


def host_pool(layout: str, mla: bool) -> Any:
    common = {"size": TOKENS, "page_size": PAGE, "dtype": torch.float32, "layer_num": LAYERS, "device": "cpu"}
    sizes = {"host_to_device_ratio": 2.0, "host_size": 0, "page_size": PAGE, "layout": layout, "pin_memory": False}
    layers = {"device_capacity_tokens": TOKENS, "start_layer": 0, "end_layer": LAYERS - 1}
    if mla:
        device = MLATokenToKVPool(**common, kv_lora_rank=8, qk_rope_head_dim=4, enable_memory_saver=False)
        return MLATokenToKVPoolHost(device._mla_buffer_info(), **sizes, **layers, target_layer_num=LAYERS)
    device = MHATokenToKVPool(**common, head_num=2, head_dim=8, enable_memory_saver=False)
    return MHATokenToKVPoolHost(device._mha_buffer_info(), **sizes, **layers)


@contextlib.contextmanager
def opened(pool: Any, **more: Any) -> Iterator[Any]:
    config = HiCacheStorageConfig(
        **{
            **{"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1},
            **{"is_mla_model": False, "enable_storage_metrics": False, "is_page_first_layout": False},
            **{"model_name": "m", "extra_config": BACKEND},
            **more,
        }
    )
    storage = StorageBackendFactory.create_backend("dynamic", config, pool)
    storage.register_mem_pool_host(pool)
    storage.register_mem_host_pool_v2(pool, PoolName.KV)
    assert storage._store.agent.wait_attached(60)
    try:
        yield storage
    finally:
        storage.close()


def hashes(count: int, seed: int = 0) -> list[str]:
    tokens = array("q", [(seed + 7 * i * i) % 1000 for i in range(count * PAGE)])
    return get_storage_hash_str(RadixKey(tokens), page_size=PAGE)


def slots(pages: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def buffers(pool: Any) -> list[torch.Tensor]:
    return [pool.kv_buffer] if isinstance(pool, MLATokenToKVPoolHost) else [pool.k_buffer, pool.v_buffer]


def page(pool: Any, number: int) -> torch.Tensor:
    return pool.get_data_page(number * PAGE, flat=True)


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_pages_come_back_as_they_were(layout: str, mla: bool) -> None:
    pool = host_pool(layout, mla)
    keys = hashes(12)
    for buffer in buffers(pool):
        buffer.copy_(torch.rand(buffer.shape))
    with opened(pool) as storage:
        assert storage.batch_exists(keys) == 0
        assert storage.batch_get_v1(keys, slots(list(range(12)))) == [False] * 12
        before = [page(pool, number).clone() for number in range(12)]
        assert storage.batch_set_v1(keys[:7], slots(list(range(7)))) == [True] * 7
        assert storage.batch_set_v1(keys[7:], slots(list(range(7, 12)))) == [True] * 5
        for buffer in buffers(pool):
            buffer.zero_()
        assert storage.batch_exists(keys) == 12 and storage.batch_exists(keys[9:]) == 3
        assert storage.batch_exists(keys[:3] + hashes(2, seed=1)) == 3
        targets = list(range(20, 32))
        assert storage.batch_get_v1(keys + hashes(2, seed=1), slots([*targets, 33, 34])) == [True] * 12 + [False] * 2
        assert all(torch.equal(page(pool, at), was) for at, was in zip(targets, before, strict=True))
        assert not page(pool, 19).any() and not page(pool, 33).any()


def test_what_was_cleared_is_not_found_and_can_be_kept_again() -> None:
    pool = host_pool("layer_first", False)
    keys = hashes(4)
    with opened(pool) as storage:
        storage.batch_set_v1(keys, slots([0, 1, 2, 3]))
        storage.clear()
        assert storage.batch_exists(keys) == 0
        assert storage.batch_set_v1(keys, slots([0, 1, 2, 3])) == [True] * 4
        assert storage.exists(keys[0])


def test_ranks_of_one_engine_share_a_node_and_no_pages_unless_they_hold_the_same() -> None:
    one, two = host_pool("layer_first", False), host_pool("layer_first", False)
    keys = hashes(4)
    for alike in (False, True):
        ranks = {"tp_size": 2, "is_mla_model": alike}
        with opened(one, tp_rank=0, **ranks) as first, opened(two, tp_rank=1, **ranks) as second:
            assert first.batch_set_v1(keys, slots([0, 1, 2, 3])) == [True] * 4
            assert second.batch_exists(keys) == (4 if alike else 0)


def test_without_its_node_pages_are_missing_and_nothing_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexkv import _core

    node = _core.Node({"pool_bytes": 16 << 20})
    node.listen(os.environ["FLEXKV_RUNTIME_DIR"], "default")
    monkeypatch.setenv("FLEXKV_NODE", "default")
    pool = host_pool("layer_first", False)
    keys = hashes(4)
    with opened(pool) as storage:
        assert storage.batch_set_v1(keys, slots([0, 1, 2, 3])) == [True] * 4
        agent = storage._store.agent

        class EndingNode:
            """Goes away after it has promised the pages."""

            def __getattr__(self, name: str) -> Any:
                if name == "arm_loads":
                    node.stop()
                return getattr(agent, name)

        monkeypatch.setattr(storage._store, "agent", EndingNode())
        assert storage.batch_get_v1(keys, slots([4, 5, 6, 7])) == [False] * 4
        assert storage.batch_exists(keys) == 0
        assert storage.batch_get_v1(keys, slots([4, 5, 6, 7])) == [False] * 4
        assert storage.batch_set_v1(hashes(4, seed=1), slots([0, 1, 2, 3])) == [False] * 4


def test_what_the_door_cannot_do_is_refused() -> None:
    pool = host_pool("layer_first", False)
    with pytest.raises(ValueError, match="interface_v1"), opened(pool, extra_config=BACKEND | {"interface_v1": 0}):
        pass
    with opened(pool) as storage:
        with pytest.raises(ValueError, match="mamba"):
            storage.register_mem_host_pool_v2(pool, PoolName.MAMBA)
        with pytest.raises(NotImplementedError, match="interface_v1"):
            storage.get("x")
    pool.layout = "page_head"
    with pytest.raises(ValueError, match="hicache-mem-layout"), opened(pool):
        pass
