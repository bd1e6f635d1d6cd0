"""An executor that calls a connector in the order in which TensorRT-LLM's does, over real KV memory of its own.

Its model writes for each token bytes that depend on all tokens up to it, on the adapter, the salt, the layer and the
rank, and checks those of all tokens before it: what a load brings back must be what was computed, on every rank.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import trtllm_stand_in as stand_in

BLOCK = 4  # tokens
LAYERS, KV, ELEMENTS = 2, 2, 3  # elements per token, layer, and of K and V
_PATIENCE_SECONDS = 30


def llm_args(tp: int = 1, **cache: Any) -> Any:
    """As TensorRT-LLM 1.2 and later configure an engine."""
    kv_cache_config = {"tokens_per_block": BLOCK, "enable_partial_reuse": False, "enable_block_reuse": True, **cache}
    return SimpleNamespace(
        model="org/model", tensor_parallel_size=tp, dtype="auto", kv_cache_config=SimpleNamespace(**kv_cache_config)
    )


def executor_config(tp: int = 1) -> Any:
    """As TensorRT-LLM 1.1 does."""
    return SimpleNamespace(
        hf_model_dir="org/model",
        tokens_per_block=BLOCK,
        mapping=SimpleNamespace(tp_size=tp, pp_size=1, cp_size=1, enable_attention_dp=False),
        kv_cache_config=SimpleNamespace(enable_partial_reuse=False, enable_block_reuse=True, host_cache_size=0),
        max_beam_width=1,
    )


@dataclass(eq=False)
class Request:
    request_id: int
    tokens: list[int]
    new_tokens: int = 1
    lora_task_id: int | None = None
    cache_salt: str | None = None
    multimodal_hashes: list[Any] | None = None
    block_ids: list[int] = field(default_factory=list)
    computed: int = 0
    local: int = 0  # tokens in the engine's own cache
    loaded: int = 0  # tokens that the connector brought
    state: str = "waiting"

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    def get_tokens(self, beam: int) -> list[int]:
        return list(self.tokens)


class Executor:
    def __init__(
        self,
        adapter: ModuleType,
        version: str,
        tp: int = 1,
        blocks: int = 32,
        config: Any = None,
        reuse: bool = False,
    ) -> None:
        config = config or llm_args(tp)
        self.version = version
        self.scheduler = adapter.FlexKVSchedulerConnector(config)
        self.pools = [torch.zeros(blocks, LAYERS, KV, BLOCK * ELEMENTS, dtype=torch.int16) for _ in range(tp)]
        self.workers = []
        for rank, pool in enumerate(self.pools):
            stand_in.set_rank(rank)
            self.workers.append(adapter.FlexKVWorkerConnector(config))
            if rank > 0:  # a process of its own, which has no scheduler
                adapter._last_place = None
            self.workers[rank].register_kv_caches(pool)
        self.free = list(range(blocks))
        # The engine's own prefix cache: which of the free blocks still hold what, if `reuse`.
        self.reuse = reuse
        self._cached: dict[str, int] = {}
        self.requests: list[Request] = []
        self.parked: dict[int, Request] = {}
        self.failed: set[int] = set()
        self.held: set[int] = set()  # finished requests whose blocks the connector asked to keep for it
        self.saved: list[int] = []  # of those, reported as no longer needed
        self.before_bind: Callable[[], None] = lambda: None
        self._told: dict[int, tuple[int, int]] = {}  # tokens and blocks
        self._new_loading: list[int] = []
        self._offered: list[set[int]] = [set() for _ in self.workers]
        self._done: list[set[int]] = [set() for _ in self.workers]
        self._next_id = 1

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()

    def run(self, tokens: list[int], **options: Any) -> Request:
        """Until the request has finished."""
        request = self.add(tokens, **options)
        self.run_until(lambda: request.state == "finished")
        return request

    def add(self, tokens: list[int], **options: Any) -> Request:
        request = Request(self._next_id, list(tokens), **options)
        self._next_id += 1
        self.requests.append(request)
        return request

    def run_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not reached():
            assert time.monotonic() < deadline
            if not self.step():
                time.sleep(0.001)

    def cancel_unseen(self, request: Request) -> None:
        """As TensorRT-LLM 1.2 does: its blocks are free, and the connector does not hear of it."""
        if request.state == "parked":
            request.computed = request.local
        self._finish(request)

    def forget_own(self) -> None:
        """As if the engine had given all its free blocks to others."""
        self._cached.clear()

    # ---- one step, in TensorRT-LLM's order

    def step(self) -> bool:
        """False: there was nothing to compute."""
        for request in [request for request in self.requests if request.state == "waiting"]:
            self._admit(request)
        batch = [request for request in self.requests if request.state == "running"]
        output = stand_in.SchedulerOutput()
        for request in batch:
            kind = output.cached_requests if request.request_id in self._told else output.new_requests
            kind.append(self._data(request))
        meta = pickle.dumps(self.scheduler.build_connector_meta(output))
        self.before_bind()
        for worker in self.workers:
            worker.bind_connector_meta(pickle.loads(meta))
            worker.start_load_kv(None)
        if batch:
            for request in batch:
                self._forward(request)
            for worker in self.workers:
                worker.wait_for_save(None)
            for request in batch:
                self._sample(request)
        self._poll()
        return bool(batch)

    def _admit(self, request: Request) -> None:
        needed = -(-(len(request.tokens) + request.new_tokens) // BLOCK)
        if len(self.free) < needed:
            return
        own = self._own_blocks(request)
        others = [block for block in self.free if block not in own][: needed - len(own)]
        request.local = len(own) * BLOCK
        matched, parked = self.scheduler.get_num_new_matched_tokens(request, request.local)
        assert 0 <= matched < len(request.tokens) - request.local  # TensorRT-LLM checks the like
        assert matched > 0 or not parked
        request.block_ids = own + others
        self.free = [block for block in self.free if block not in request.block_ids]
        self._cached = {key: block for key, block in self._cached.items() if block not in others}
        for pool in self.pools:  # what a load does not fill must not look right by chance
            pool[others] = -1
        self.scheduler.update_state_after_alloc(request, list(request.block_ids))
        request.loaded = matched
        request.computed = request.local + matched
        request.state = "parked" if parked else "running"
        if parked:
            self.parked[request.request_id] = request
            self._new_loading.append(request.request_id)

    def _own_blocks(self, request: Request) -> list[int]:
        own: list[int] = []
        for end in range(BLOCK, len(request.tokens), BLOCK):
            block = self._cached.get(_identity(request, end))
            if block not in self.free:
                break
            own.append(block)
        return own

    def _data(self, request: Request) -> Any:
        tokens, blocks = self._told.get(request.request_id, (0, 0))
        self._told[request.request_id] = len(request.tokens), len(request.block_ids)
        return stand_in.request_data(
            self.version,
            request_id=request.request_id,
            new_tokens=request.tokens[tokens:],
            new_block_ids=request.block_ids[blocks:],
            computed_position=request.computed,
            num_scheduled_tokens=len(request.tokens) - request.computed,
            cache_salt=request.cache_salt,
        )

    def _forward(self, request: Request) -> None:
        for rank, pool in enumerate(self.pools):
            for position in range(len(request.tokens)):
                block = pool[request.block_ids[position // BLOCK]].view(LAYERS, KV, BLOCK, ELEMENTS)
                expected = _kv(request, position, rank)
                if position < request.computed:
                    assert torch.equal(block[:, :, position % BLOCK], expected), (request.request_id, rank, position)
                else:
                    block[:, :, position % BLOCK] = expected
        request.computed = len(request.tokens)

    def _sample(self, request: Request) -> None:
        request.tokens.append(sum(request.tokens) % 1000)
        if len(request.tokens) - request.prompt_tokens < request.new_tokens:
            return
        assert not self.scheduler.request_finished(request, list(request.block_ids))
        self._finish(request)

    def _finish(self, request: Request) -> None:
        request.state = "finished"
        self.requests.remove(request)
        self.parked.pop(request.request_id, None)
        self.free += request.block_ids
        if self.reuse:
            for index in range(request.computed // BLOCK):
                self._cached[_identity(request, (index + 1) * BLOCK)] = request.block_ids[index]

    def _poll(self) -> None:
        started, self._new_loading = self._new_loading, []
        for worker, offered, done in zip(self.workers, self._offered, self._done, strict=True):
            offered.update(started)
            saved, loaded = worker.get_finished([], list(started))
            assert set(saved) <= self.held
            self.saved += saved
            assert set(loaded) <= offered and len(set(loaded)) == len(loaded)  # TensorRT-LLM ends with a KeyError
            offered.difference_update(loaded)
            done.update(loaded)
            if self.version == "branch":
                self.failed |= worker.take_failed_load_request_ids()
        everywhere = set.intersection(*self._done)
        for done in self._done:
            done -= everywhere
        for request_id in everywhere:
            if (request := self.parked.pop(request_id, None)) is not None:
                request.state = "running"

    # ---- what the cache has

    def kept_blocks(self, tokens: list[int], name_space: list[str] | None = None) -> int:
        from flexkv import _core

        side = self.scheduler._side
        sequence = side._client.open_sequence()
        hashes = _core.TokenHashes(torch.tensor(tokens).numpy(), BLOCK, name_space or [])
        host, _ = side._client.lookup_in_host_memory(sequence, hashes)
        side._client.close_sequence(sequence)
        return int(host)

    def wait_until_kept(self, tokens: list[int], blocks: int, name_space: list[str] | None = None) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self.kept_blocks(tokens, name_space) < blocks:
            assert time.monotonic() < deadline
            time.sleep(0.002)


def _identity(request: Request, tokens: int) -> str:
    return repr((request.tokens[:tokens], request.lora_task_id, request.cache_salt))


def _kv(request: Request, position: int, rank: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{_identity(request, position + 1)} {rank}".encode()).digest()[
        : 2 * LAYERS * KV * ELEMENTS
    ]
    return torch.frombuffer(bytearray(digest), dtype=torch.int16).view(LAYERS, KV, ELEMENTS)
