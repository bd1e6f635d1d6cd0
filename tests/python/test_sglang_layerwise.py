"""Why the layer-wise loads of SGLang's --enable-flexkv are refused (docs/decisions/0015): what its own prefix cache,
layer counter and KV pool do around a load that runs. FlexKV's part is a manager that finds everything and whose loads
never end."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
sys.path.append(str(Path(__file__).parents[1] / "e2e" / "sglang_cpu"))  # what SGLang takes from CUDA even on CPUs
pytest.importorskip("sglang.srt.mem_cache.radix_cache", reason="SGLang is not installed", exc_type=ImportError)
pytest.importorskip("flexkv._core")

import torch  # noqa: E402
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.common import evict_from_tree_cache  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402
from sglang.srt.mem_cache.storage.flexkv import flexkv_radix_cache  # noqa: E402
from sglang.srt.mem_cache.storage.flexkv.flexkv_comm import FlexKVLayerDoneCounter  # noqa: E402
from sglang.srt.mem_cache.storage.flexkv.flexkv_connector import FlexKVConnector  # noqa: E402

PAGE, LAYERS, SLOTS = 16, 2, 128


class Manager:
    """Loads that it launched run for ever: nothing signals their layers."""

    def __init__(self) -> None:
        self.loading: list[list[int]] = []  # the slots of each

    def get_match(self, token_ids: Any, token_mask: Any) -> tuple[int, Any]:
        return len(self.loading), token_mask

    def launch(self, slot_mappings: list[torch.Tensor], **_: Any) -> None:
        self.loading += [slots.tolist() for slots in slot_mappings]


class Engine:
    """SGLang's own cache, connector, counter and pool; of the connector all but its start, which looks for a FlexKV."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.manager, self.counter = Manager(), FlexKVLayerDoneCounter(LAYERS)
        connector = FlexKVConnector.__new__(FlexKVConnector)
        others = ("needs_sync", "is_pp_receiver", "is_pp_sender", "should_send_slot_mapping_to_remote")
        alone = SimpleNamespace(is_sync_leader=True, **dict.fromkeys(others, False))
        connector.__dict__ |= {"_sync_ctx": alone, "page_size": PAGE}
        connector.__dict__ |= {"_pending_lookups": {}, "_launched_load_tids": [], "_inflight_stores": {}}
        connector.__dict__ |= {"_ongoing_prefetches": {}, "_inflight_loads": {}, "_completed_layerwise": []}
        connector.__dict__ |= {"kv_manager": self.manager, "enable_layerwise": True, "layer_done_counter": self.counter}
        monkeypatch.setattr(flexkv_radix_cache, "FlexKVConnector", lambda **_: connector)
        common: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        self.kv = MHATokenToKVPool(
            SLOTS, page_size=PAGE, head_num=1, head_dim=4, layer_num=LAYERS, enable_memory_saver=False, **common
        )
        self.allocator = PagedTokenToKVPoolAllocator(SLOTS, PAGE, kvcache=self.kv, need_sort=False, **common)
        rows = ReqToTokenPool(size=4, max_context_len=SLOTS, device="cpu", enable_memory_saver=False)
        params = CacheInitParams(False, rows, self.allocator, PAGE)
        self.cache = flexkv_radix_cache.FlexKVRadixCache(params, None, None, 0, 1, None, 0, 0)

    def match(self, prompt: Sequence[int]) -> int:
        """As for a request that waits; the tokens that the device holds, or is going to."""
        return self.cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", prompt)))).device_prefix_len

    def forward(self) -> None:
        """Of a batch, once all loads are there."""
        for event in self.counter.events:
            for descriptor in event.load_event_fds:
                os.write(descriptor, (1).to_bytes(8, sys.byteorder))
        for layer in range(LAYERS):
            self.kv.get_key_buffer(layer)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch)


def prompt(seed: int, pages: int = 2) -> list[int]:
    return [seed * 1000 + i for i in range(pages * PAGE)]


def test_slots_that_a_load_still_fills_are_given_to_another_request_and_written(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = SLOTS // PAGE
    assert engine.match(prompt(1, pages)) == SLOTS  # launched, although the request may wait for long
    evict_from_tree_cache(engine.cache, SLOTS)  # as for any request that needs slots
    given = engine.allocator.alloc(SLOTS)
    assert sorted(given.tolist()) == sorted(engine.manager.loading[0])

    # The other request's forward writes a layer before it waits for it, so the load overwrites what was computed.
    class Waited(Exception):
        pass

    def wait_until(layer: int) -> None:
        raise Waited(layer)

    monkeypatch.setattr(engine.counter, "wait_until", wait_until)
    computed = torch.ones(SLOTS, 1, 4)
    engine.kv.set_kv_buffer(SimpleNamespace(layer_id=0), given, computed, computed)
    with pytest.raises(Waited):
        engine.kv.get_key_buffer(0)


def test_a_load_that_another_one_followed_is_never_waited_for_and_ends_the_scheduler_later(engine: Engine) -> None:
    assert engine.match(prompt(1)) == engine.match(prompt(2)) == 2 * PAGE  # of one batch
    engine.forward()
    engine.match(prompt(3))
    with pytest.raises(AssertionError, match="finished before reuse"):
        engine.match(prompt(4))


def test_a_flush_before_the_forward_ends_the_scheduler_at_the_next_load(engine: Engine) -> None:
    engine.match(prompt(1))
    engine.cache.reset()  # its request was aborted meanwhile
    with pytest.raises(AssertionError, match="finished before reuse"):
        engine.match(prompt(1))


def test_a_load_that_cannot_begin_any_more_ends_the_scheduler(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node went away between lookup and launch: SGLang takes no less than what was found."""

    def launch(**_: Any) -> None:
        raise RuntimeError("the node is gone")

    monkeypatch.setattr(engine.manager, "launch", launch)
    with pytest.raises(RuntimeError, match="gone"):
        engine.match(prompt(1))
