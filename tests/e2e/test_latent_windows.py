"""DeepSeek-V4's KV cache: compressed latents, and windows over latents and over what they are made of. No kernel for
CPUs runs that model; here are vLLM's own descriptions, groups, block pool and memory of it, our two sides, a node,
agents, and in place of the model a forward that writes into each block what only the tokens up to its end determine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("vllm.models.deepseek_v4", reason="this vLLM has no DeepSeek-V4", exc_type=ImportError)

import torch
from flexkv.config import load
from flexkv.integration.vllm import identity
from flexkv.integration.vllm.groups import UnsupportedGroups, groups_of
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.worker import WorkerSide
from vllm import SamplingParams
from vllm.config.cache import _layout_from_name
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, MLAAttentionSpec, SlidingWindowMLASpec
from vllm.v1.request import Request
from vllm.v1.worker.utils import allocate_kv_cache

from flexkv import _core

BLOCKS = 640
PREFIX = 256  # prefixes end at multiples of it
CHUNK = 704  # ends within blocks and between boundaries
RATIOS = [1, 4, 128, 4]  # of layers: one entry for so many tokens
FP8 = {"dtype": torch.uint8, "state_content_bytes": 584, "alignment": 576, "cache_dtype_str": "fp8_ds_mla"}
_PATIENCE_SECONDS = 60


def layers() -> dict[str, KVCacheSpec]:
    """As vllm/models/deepseek_v4 describes them, with small states."""
    common: dict[str, Any] = {"num_kv_heads": 1, "max_tp_shards": 1}
    latents: dict[str, Any] = common | FP8 | {"head_size": 512, "model_version": "deepseek_v4"}
    found: dict[str, KVCacheSpec] = {}
    for number, ratio in enumerate(RATIOS):
        found[f"{number}.window"] = SlidingWindowMLASpec(block_size=64, sliding_window=128, **latents)
        if ratio == 1:
            continue
        found[f"{number}.latents"] = MLAAttentionSpec(block_size=PREFIX, tokens_per_state=ratio, **latents)
        overlap = 2 if ratio == 4 else 1
        state: dict[str, Any] = common | {"dtype": torch.float32, "alignment": 576, "sliding_window": overlap * ratio}
        state["block_size"] = 4 if ratio == 4 else 8
        found[f"{number}.compressor"] = SlidingWindowMLASpec(head_size=64 * overlap, **state)
    return found


def engine_config(blocks: int = BLOCKS) -> Any:
    layout = _layout_from_name("BLHNC")
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(engine_id="engine"),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        parallel_config=SimpleNamespace(
            **{"world_size": 1, "pipeline_parallel_size": 1, "tensor_parallel_size": 1},
            **{"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1},
        ),
        cache_config=SimpleNamespace(
            **{"block_size": PREFIX, "sliding_window": None},
            **{"num_gpu_blocks": blocks, "num_gpu_blocks_override": blocks},
            **{"enable_prefix_caching": True, "prefix_match_unit": None, "prefix_cache_retention_interval": None},
            get_resolved_kv_cache_layout=lambda: layout,
        ),
        speculative_config=None,
        model_config=None,
    )


def cache_config(config: Any, specs: dict[str, KVCacheSpec]) -> KVCacheConfig:
    """As vLLM's engine core makes it."""
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    made = kv_cache_utils.get_kv_cache_config_from_groups(config, groups, 1 << 30)
    made.hash_block_size = kv_cache_utils.resolve_kv_cache_block_sizes(made, config)[1]
    return made


class Engine:
    """Schedules one request at a time, as vLLM's scheduler does with our connector."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runtime: Path, blocks: int, pool: int, drives: bool) -> None:
        monkeypatch.setattr(identity, "worker_rank", lambda config: 0)  # vLLM's process groups are not there to ask
        self.config = engine_config(blocks)
        self.cache = cache_config(self.config, layers())
        self.groups = groups_of(self.config, self.cache)
        settings = load(extra={"runtime_dir": str(runtime), "log_level": "error"}, extra_origin="test")
        options: dict[str, Any] = {"pool_bytes": pool, "mode": "embedded", "log_level": "error"}
        if drives:
            (runtime / "ssd").mkdir(mode=0o700)
            options |= {"ssd_bytes": 256 << 20, "ssd_directories": [str(runtime / "ssd")], "ssd_admission": False}
        self.node = _core.Node(options)
        self.node.listen(str(runtime), identity.embedded_node_name(self.config))
        self.clients = [
            _core.Client.embedded(self.node, g.engine_id("engine"), 1, g.model_name("v4"), g.fingerprint(bytes(32)), 0)
            for g in self.groups
        ]
        monkeypatch.setattr(
            "flexkv.integration.vllm.scheduler.open_clients", lambda *_: (self.clients, self.node, None)
        )
        scheduler_cache = kv_cache_utils.generate_scheduler_kv_cache_config([self.cache])
        self.scheduler = SchedulerSide(self.config, settings, groups_of(self.config, scheduler_cache))
        self.worker = WorkerSide(self.config, settings, self.groups, blocks)
        self.memory = allocate_kv_cache(
            self.cache, torch.device("cpu"), self.config.cache_config.get_resolved_kv_cache_layout()
        )
        self.worker.register_kv_caches(self.memory)
        for client in self.clients:
            _until(lambda client=client: client.served(0.01))
        hash_tokens = self.cache.hash_block_size
        assert hash_tokens is not None
        self.manager = KVCacheManager(scheduler_cache, 1 << 14, PREFIX, hash_tokens)
        self._hasher = kv_cache_utils.get_request_block_hasher(hash_tokens, sha256)
        kv_cache_utils.init_none_hash(sha256)
        self._late = False
        self._unsaved: list[Any] = []

    def run(self, name: str, prompt: list[int], forget: bool = True, patient: bool = True) -> int:
        """The tokens that were loaded. `forget`: vLLM's own cache. `patient`: saves end before the next step; else they
        begin only when that has written."""
        self._late = not patient
        request = Request(name, prompt, SamplingParams(max_tokens=1), None, block_hasher=self._hasher)
        request.kv_transfer_params = None
        found, local, *_ = self.manager.get_computed_blocks_for_connector(request)
        loaded, beside = self.scheduler.get_num_new_matched_tokens(request, local)
        assert self.scheduler.get_num_new_matched_tokens(request, local) == (loaded, beside)  # as while it waits
        more: dict[str, Any] = {"num_new_computed_tokens": local, "new_computed_blocks": found}
        if loaded:
            assert beside  # vLLM zeroes blocks of loads within a step
            more |= {"num_external_computed_tokens": loaded, "delay_cache_blocks": True}
            every = tuple(range(len(self.groups)))
            blocks = self.manager.allocate_slots(request, 0, skip_zeroing_group_ids=every, **more)
            assert blocks is not None
            self.scheduler.update_state_after_alloc(request, self.manager.get_blocks(name), loaded)
            self._step([], [], {})
            ((order, good),) = _until(lambda: self.worker.take_ended_loads(0))
            assert good == len(order.block_ids), "a load failed"
            self.manager.cache_blocks(request, local + loaded)
            more = {}
        computed = local + loaded
        while computed < len(prompt):
            request.num_computed_tokens = computed if not more else 0  # as vLLM counts: what was found comes on top
            count = min(CHUNK, len(prompt) - computed)
            new = self.manager.allocate_slots(request, count, **more)
            assert new is not None
            if computed == local + loaded:
                self.scheduler.update_state_after_alloc(request, self.manager.get_blocks(name), 0)
                tables = self.manager.get_block_ids(name)
                first = SimpleNamespace(req_id=name, num_computed_tokens=computed, block_ids=tables)
                self._step([first], [], {name: count}, functools.partial(self._forward, request, computed, count))
            else:
                later = (name, computed, new.get_block_ids(allow_none=True))
                self._step([], [later], {name: count}, functools.partial(self._forward, request, computed, count))
            more = {}
            computed += count
            if patient:
                self.settle()
        self.manager.free(request)
        self.scheduler.request_finished(request)
        if patient:
            self.settle()
        if forget:
            assert self.manager.reset_prefix_cache()
            if patient:
                next(iter(self.memory.values())).untyped_storage().fill_(255)  # all of it: groups overlay each other
        return loaded

    def settle(self) -> None:
        while self._unsaved:
            self.worker.start_saves(self._unsaved.pop(0))

        def quiet() -> bool:
            self.scheduler._saves._settle()
            return self.scheduler._saves._running.reading() is None

        _until(quiet)

    def _step(self, new: list[Any], later: list[Any], scheduled: dict[str, int], forward: Any = lambda: None) -> None:
        cached = SimpleNamespace(
            req_ids=[one[0] for one in later],
            num_computed_tokens=[one[1] for one in later],
            new_block_ids=[one[2] for one in later],
            resumed_req_ids=set(),
        )
        zeroed = self.manager.take_new_block_ids()
        output: Any = SimpleNamespace(
            **{"scheduled_new_reqs": new, "scheduled_cached_reqs": cached, "num_scheduled_tokens": scheduled},
            **{"total_num_scheduled_tokens": sum(scheduled.values()), "new_block_ids_to_zero": zeroed},
        )
        meta = self.scheduler.build_connector_meta(output)
        for block in zeroed:
            for tensor in self.memory.values():
                tensor[block].zero_()
        self.worker.start_loads(meta, False)
        forward()
        self._unsaved.append(meta)
        while len(self._unsaved) > self._late:
            self.worker.start_saves(self._unsaved.pop(0))

    def _forward(self, request: Request, computed: int, count: int) -> None:
        """Reads what is computed and writes the blocks that the step completes, wherever the model's layers do."""
        for group, table in zip(self.groups, self.manager.get_block_ids(request.request_id), strict=True):
            size = group.block_tokens
            for number in range(group.first_live(computed), (computed + count) // size):
                end = (number + 1) * size
                prefix = request.block_hashes[end // (self.cache.hash_block_size or 1) - 1]
                for name in group.layer_names or ():
                    page, content = self.memory[name][table[number]], _content(prefix, name)
                    if end <= computed:
                        assert table[number] != 0 and bool((page == content).all()), f"{name}: tokens before {end}"
                    else:
                        page.fill_(content)

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()


def _content(prefix: bytes, layer: str) -> int:
    """`prefix`: vLLM's hash of all tokens up to the end of a block."""
    return hashlib.sha256(prefix + layer.encode()).digest()[0] % 250 + 1


def _until(condition: Any) -> Any:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)
    return result


@pytest.fixture
def engine(request: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Engine]:
    tmp_path.chmod(0o700)
    made = Engine(monkeypatch, tmp_path, *getattr(request, "param", (BLOCKS, 512 << 20, False)))
    yield made
    made.close()


def prompt(count: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + i * i + 3 * i) % 50_000 for i in range(count)]


def test_a_prompt_is_loaded_as_far_as_all_groups_have_it(engine: Engine) -> None:
    kinds = {(group.block_tokens, group.tail_blocks) for group in engine.groups}
    assert kinds == {(PREFIX, 0), (64, 2), (8, 16), (4, 2)}
    shared = prompt(1500)
    assert engine.run("cold", shared) == 0
    assert engine.run("again", shared) == 5 * PREFIX
    assert engine.run("longer", shared + prompt(400, 1)) == 5 * PREFIX
    # It parts in the midst of a chunk, after 3.5 boundaries.
    assert engine.run("other", shared[:900] + prompt(600, 2)) == 3 * PREFIX
    assert engine.run("other again", shared[:900] + prompt(600, 2)) == 5 * PREFIX


def test_what_the_engine_holds_itself_is_not_loaded_over(engine: Engine) -> None:
    shared = prompt(1500)
    engine.run("cold", shared)
    assert engine.run("first part", shared[: 2 * PREFIX + 1], forget=False) == 2 * PREFIX
    assert engine.run("whole", shared, forget=False) == 3 * PREFIX  # behind the two that are there
    assert engine.run("whole again", shared, forget=False) == 0


def test_a_prefix_whose_window_is_not_kept_is_served_up_to_the_one_before(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = prompt(1500)
    orders = engine.scheduler._saves
    # Of one group the tail before the fifth boundary is not saved; of another one only a part of the one before that.
    keep = orders._save_apart

    def some(group: Any, hashes: list[bytes], blocks: list[int], meta: Any) -> None:
        request = next(iter(engine.scheduler._requests.values())).request
        ends = [number * PREFIX // (engine.cache.hash_block_size or 1) - 1 for number in (5, 4)]
        heads = [request.block_hashes[number] for number in ends]
        if group.index == 1 and hashes[0] == heads[0]:
            return
        if group.tail_blocks == 16 and hashes[0] == heads[1]:
            hashes, blocks = hashes[:9], blocks[:9]
        keep(group, hashes, blocks, meta)

    monkeypatch.setattr(orders, "_save_apart", some)
    engine.run("cold", shared)
    monkeypatch.undo()
    assert engine.run("again", shared) == 3 * PREFIX
    assert engine.run("once more", shared) == 5 * PREFIX  # what was computed again was saved


@pytest.mark.parametrize("engine", [(330, 512 << 20, False)], indirect=True, ids=["a small engine"])
def test_saves_that_steps_overwrite_leave_nothing_wrong(engine: Engine) -> None:
    """Nearly every step takes blocks that saves of the step before it are to read; `run` checks what is loaded."""
    loaded = 0
    for number in range(3):
        long = prompt(1500, number)
        engine.run(f"long {number}", long, patient=False)
        loaded += engine.run(f"short {number}", long[:600])  # what the first of three steps saved
        loaded += engine.run(f"long again {number}", long)
    assert loaded > 0


@pytest.mark.parametrize("engine", [(BLOCKS, 8 << 20, False)], indirect=True, ids=["a small node"])
def test_of_what_was_evicted_nothing_wrong_is_left(engine: Engine) -> None:
    """Tails and latents go each for themselves, and tails by and by."""
    loaded = []
    for number in range(10):
        engine.run(f"{number}", prompt(1500, number))
        loaded.append(engine.run(f"{number} again", prompt(1500, number)))
        if number >= 2:
            loaded.append(engine.run(f"older than {number}", prompt(1500, number - 2)))
    assert 0 < sum(loaded) < len(loaded) * 5 * PREFIX, loaded  # some of it was evicted


@pytest.mark.parametrize("engine", [(BLOCKS, 12 << 20, True)], indirect=True, ids=["a small node with drives"])
def test_what_was_evicted_to_drives_is_loaded_from_there(engine: Engine) -> None:
    for number in range(6):
        engine.run(f"{number}", prompt(1500, number))
    _until(lambda: json.loads(engine.node.status())["queues"]["disk_writes"] == 0)
    assert [engine.run(f"{number} again", prompt(1500, number)) for number in range(3)] == [5 * PREFIX] * 3
    assert json.loads(engine.node.status())["lookups"]["disk_blocks_hit"] > 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"compressed": False}, "only are not supported"),
        ({"window": 512}, "needs 512 tokens"),
        ({"replay": True}, "other than full"),
        ({"zeroes": True}, "zeroes blocks"),
    ],
    ids=["drafts", "windows only", "wide windows", "windows that are computed again", "loads that are zeroed"],
)
def test_refused(change: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config()
    specs = layers()
    if not change.get("compressed", True):
        specs = {name: spec for name, spec in specs.items() if not isinstance(spec, MLAAttentionSpec)}
    for name, spec in specs.items():
        if name.endswith("window"):
            wider = {"sliding_window": change.get("window", 128), "bounded_replay": change.get("replay", False)}
            specs[name] = dataclasses.replace(spec, **wider)
    config.speculative_config = change.get("speculative_config")
    if change.get("zeroes"):
        monkeypatch.setattr("flexkv.integration.vllm.compat.LEAVES_LOADED_BLOCKS", False)
    with pytest.raises(UnsupportedGroups, match=why):
        made = cache_config(engine_config(), specs)
        groups_of(config, made)
