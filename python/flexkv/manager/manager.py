"""KVManager: the original's interface to the cache, over the core's client.

One engine's scheduler owns it. Its calls are short, but for wait() and, while ranks are still coming, is_ready(); the
transfers are carried out by the ranks' agents (`ranks.KVTPClient`). Wrong arguments raise ValueError; whatever goes
wrong in the cache is a miss, or a task that has failed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from flexkv import _core
from flexkv.config import Settings
from flexkv.manager.model import CacheConfig, ModelConfig
from flexkv.manager.place import gpu_register_port as default_register_port
from flexkv.manager.place import load_settings, meeting_place
from flexkv.manager.requests import KVResponse, KVResponseStatus
from flexkv.manager.slots import device_blocks, masked_range, token_array
from flexkv.manager.tasks import Batch, Span, Task, Tasks
from flexkv.node_start import start_node

logger = logging.getLogger("flexkv.manager")

# Task ids of the managers of one engine do not overlap.
_TASK_IDS = 10_000_000
# is_ready() waits so long for ranks that are just registering.
_READY_SECONDS = 1.0

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _one_at_a_time(method: Callable[Concatenate[KVManager, _P], _R]) -> Callable[Concatenate[KVManager, _P], _R]:
    @functools.wraps(method)
    def locked(self: KVManager, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class KVManager:
    """Calls of several threads are carried out one at a time; also those that wait."""

    def __init__(
        self,
        model_config: ModelConfig,
        cache_config: CacheConfig,
        dp_client_id: int = 0,
        server_recv_port: str = "",
        gpu_register_port: str = "",
        event_collector: Any = None,
    ) -> None:
        """`server_recv_port`, `gpu_register_port`: texts by which the ranks find this manager. ValueError: a wrong
        configuration."""
        model_config.freeze()
        self._model = model_config
        self._cache = cache_config
        self._settings: Settings = load_settings(cache_config.settings(model_config))
        self.dp_client_id = dp_client_id
        self.gpu_register_port = gpu_register_port or default_register_port(server_recv_port)
        self._place = meeting_place(self._settings, self.gpu_register_port, dp_client_id)
        self._lock = threading.RLock()
        self._node: Any = None
        self._client: Any = None
        self._tasks: Tasks | None = None
        if event_collector is not None:
            logger.warning("KVManager: event_collector is not supported; no events are published")

    # ---- life

    @_one_at_a_time
    def start(self) -> None:
        """Opens the cache, or attaches to the daemon. Waits for no rank. RuntimeError: the cache cannot be opened."""
        if self._client is not None:
            return
        place, model = self._place, self._model
        who = (place.engine_id, model.rank_count, self._model_name(), self._fingerprint(), self._cache.tokens_per_block)
        if place.mode == "embedded":
            try:
                self._node = start_node(_core, self._settings, "embedded", place.node_name)
            except RuntimeError as error:
                if model.total_clients == 1:
                    raise RuntimeError(
                        f"{error}. Another manager has the port {self.gpu_register_port!r}: give this one, and its ranks, "
                        "another server_recv_port"
                    ) from None
        if self._node is not None:
            self._client = _core.Client.embedded(self._node, *who)
            logger.info("%s", self._node.describe())
        else:  # a daemon, or the node of another data-parallel rank
            self._client = _core.Client.remote(place.runtime_dir, place.node_name, *who)
        self._tasks = Tasks(self._client, itertools.count(self.dp_client_id * _TASK_IDS))

    @_one_at_a_time
    def is_ready(self) -> bool:
        """Whether all ranks have registered. Waits for them for a moment (1 s), where their coming is told."""
        return bool(self._client is not None and self._client.served(_READY_SECONDS))

    @_one_at_a_time
    def shutdown(self) -> None:
        """Ends all that runs. What an embedded cache held in host memory is gone."""
        if self._client is not None:
            self._client.close()
        if self._node is not None:
            self._node.stop()
        self._client = self._node = self._tasks = None

    # ---- match

    @_one_at_a_time
    def get_match(
        self,
        token_ids: Any,
        token_mask: Any = None,
        cpu_only: bool = False,
        namespace: list[str] | None = None,
        swa_aware: bool = False,
    ) -> tuple[int, np.ndarray]:
        """Which of the masked tokens can be loaded: whole blocks from the mask's first token on. To be launched or
        canceled; what is found is protected from eviction for a moment (2 s) only. Nothing found: the task has ended."""
        tasks = self._running_tasks()
        token_count, first, hashes = self._chain(token_ids, token_mask, namespace)
        sequence = tasks.client.open_sequence()
        if cpu_only or self._cache.host_memory_only:
            kept, anywhere = tasks.client.lookup_in_host_memory(sequence, hashes, first)
            if kept < anywhere and not cpu_only:
                tasks.client.prefetch(sequence, hashes)
        else:
            kept, _, _ = tasks.client.lookup(sequence, hashes, first)
        return self._matched(False, hashes, first, kept, token_count, sequence)

    @_one_at_a_time
    def put_match(
        self, token_ids: Any, token_mask: Any = None, namespace: list[str] | None = None
    ) -> tuple[int, np.ndarray]:
        """Which tokens, in whole blocks, are not in this node's host memory yet: launch() wants their slots. The mask must
        begin with token 0."""
        tasks = self._running_tasks()
        token_count, first, hashes = self._chain(token_ids, token_mask, namespace)
        if first > 0:
            raise ValueError("the token_mask of a put must begin with token 0: blocks are kept behind their prefix only")
        sequence = tasks.client.open_sequence()
        # Blocks that only another node has may be gone with it. Those on drives here the node does not take again.
        kept, _ = tasks.client.lookup_in_host_memory(sequence, hashes)
        return self._matched(True, hashes, kept, len(hashes), token_count, sequence)

    def _chain(self, token_ids: Any, token_mask: Any, namespace: list[str] | None) -> tuple[int, int, Any]:
        """The number of tokens, the first block of the mask, and the hashes of the blocks up to its end."""
        tokens = token_array(token_ids)
        size = self._cache.tokens_per_block
        first, end = masked_range(token_mask, len(tokens), size)
        return len(tokens), first // size, _core.TokenHashes(tokens[:end], size, list(namespace or []))

    def _matched(
        self, save: bool, hashes: Any, first: int, end: int, token_count: int, sequence: int
    ) -> tuple[int, np.ndarray]:
        """A task for blocks [first, end), if there are any."""
        tasks = self._running_tasks()
        size = self._cache.tokens_per_block
        first = min(first, end)
        span = Span(token_count, first * size, end * size)
        task = Task(next(tasks.ids), save, hashes, first, end - first, span, sequence)
        if first == end:
            tasks.close_sequence(task)
            tasks.end(task, KVResponseStatus.SUCCESS)
        else:
            tasks.add_matched(task)
        return task.id, span.mask()

    # ---- transfers

    @_one_at_a_time
    def launch(
        self,
        task_ids: int | Iterable[int],
        slot_mappings: Any,
        swa_slot_mappings: Any = None,
        as_batch: bool = False,
        layerwise_transfer: bool = False,
        counter_id: int = 0,
    ) -> list[int]:
        """Starts matched tasks: the slots are those of each task's masked tokens, in order. The device blocks must be
        computed (put), or free to be overwritten (get), when this is called, and stay so until the task has ended.
        `as_batch`: several tasks end as one, with a new id. Returns the ids to wait for. ValueError, and nothing was
        started: slots that are no whole blocks."""
        if swa_slot_mappings is not None:
            raise ValueError("swa_slot_mappings: a second pool for sliding windows is not supported")
        tasks = self._running_tasks()
        tasks.settle()  # also for a caller that never waits
        ids = _id_list(task_ids)
        mappings = list(slot_mappings) if isinstance(slot_mappings, (list, tuple)) else [slot_mappings]
        if len(ids) != len(mappings):
            raise ValueError(f"{len(ids)} tasks and {len(mappings)} slot mappings")
        size = self._cache.tokens_per_block
        blocks = {
            task_id: device_blocks(mapping, tasks.matched[task_id].block_count * size, size, f"task {task_id}")
            for task_id, mapping in zip(ids, mappings, strict=True)
            if task_id in tasks.matched
        }
        started = [task for task_id in blocks if (task := tasks.take_matched(task_id)) is not None]
        batch = Batch(next(tasks.ids), started, len(started)) if as_batch and len(ids) > 1 and started else None
        if batch is not None:
            tasks.batches[batch.id] = batch
        for task in started:
            task.batch = batch
            self._start(tasks, task, blocks[task.id])
        return [batch.id] if batch is not None else ids

    def _start(self, tasks: Tasks, task: Task, blocks: np.ndarray) -> None:
        client = tasks.client
        if not task.sequence:
            task.sequence = client.open_sequence()
        if task.save:
            job = client.save(task.sequence, task.hashes, task.first_block, blocks.tolist(), at_once=True)
        else:
            client.lookup(task.sequence, task.hashes, task.first_block)  # tells the node the chain if it has forgotten it
            job = client.load(task.sequence, task.first_block, blocks.tolist(), at_once=True)
        if job == 0:
            tasks.end(task, KVResponseStatus.FAILED, "no node, or not all ranks are there")
        else:
            tasks.start(task, job)
        tasks.close_sequence(task)

    def get_async(
        self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: list[str] | None = None
    ) -> int:
        """get_match and launch; `slot_mapping`: of all masked tokens, of which those that are found are filled."""
        return self._at_once(self.get_match, token_ids, slot_mapping, token_mask, namespace)

    def put_async(
        self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: list[str] | None = None
    ) -> int:
        """put_match and launch; `slot_mapping`: of all masked tokens."""
        return self._at_once(self.put_match, token_ids, slot_mapping, token_mask, namespace)

    @_one_at_a_time
    def _at_once(
        self,
        match: Callable[..., tuple[int, np.ndarray]],
        token_ids: Any,
        slot_mapping: Any,
        token_mask: Any,
        namespace: list[str] | None,
    ) -> int:
        task_id, mask = match(token_ids, token_mask=token_mask, namespace=namespace)
        if task_id not in self._running_tasks().matched:
            return task_id
        asked = np.ones(len(mask), dtype=np.bool_) if token_mask is None else np.asarray(token_mask)
        slots = token_array(slot_mapping)
        try:
            if len(slots) != int(asked.sum()):
                raise ValueError(f"slot_mapping has {len(slots)} slots for {int(asked.sum())} masked tokens")
            self.launch(task_id, [slots[mask[asked]]])
        except ValueError:
            self.cancel(task_id)
            self._running_tasks().ended.pop(task_id, None)
            raise
        return task_id

    @_one_at_a_time
    def prefetch_async(self, token_ids: Any, namespace: list[str] | None = None, swa_aware: bool = False) -> int:
        """Begins to bring blocks that are only on drives to host memory. The task has ended as soon as that is ordered;
        its mask says which tokens were in host memory then."""
        tasks = self._running_tasks()
        token_count, _, hashes = self._chain(token_ids, None, namespace)
        sequence = tasks.client.open_sequence()
        in_host, _ = tasks.client.lookup_in_host_memory(sequence, hashes)
        tasks.client.prefetch(sequence, hashes)
        span = Span(token_count, 0, in_host * self._cache.tokens_per_block)
        task = Task(next(tasks.ids), False, hashes, 0, in_host, span, sequence)
        tasks.close_sequence(task)
        tasks.end(task, KVResponseStatus.SUCCESS)
        return task.id

    # ---- ends

    @_one_at_a_time
    def wait(
        self, task_ids: int | Iterable[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """Waits until the tasks have ended, and takes their responses; TIMEOUT: those that run on. A put has ended when
        its blocks are kept in host memory; drives are written later (`completely` does not wait for them)."""
        tasks = self._running_tasks()
        ids = _id_list(task_ids)
        deadline = time.monotonic() + max(timeout, 0.0)
        while True:
            tasks.settle()
            if not any(tasks.is_running(task_id) for task_id in ids):
                break
            left = deadline - time.monotonic()
            if left <= 0 or not tasks.client.wait_ended_jobs(left):
                tasks.settle()
                break
        return {
            task_id: KVResponse(KVResponseStatus.TIMEOUT, task_id)
            if tasks.is_running(task_id)
            else tasks.take(task_id)
            for task_id in ids
        }

    @_one_at_a_time
    def try_wait(self, task_ids: int | Iterable[int]) -> dict[int, KVResponse]:
        """The responses of those tasks that do not run."""
        tasks = self._running_tasks()
        tasks.settle()
        return {task_id: tasks.take(task_id) for task_id in _id_list(task_ids) if not tasks.is_running(task_id)}

    @_one_at_a_time
    def cancel(self, task_ids: int | Iterable[int]) -> None:
        """Matched tasks end at once; running ones as soon as nothing touches their device blocks any more: wait for
        them. Others are not changed."""
        tasks = self._running_tasks()
        for task_id in _id_list(task_ids):
            if (task := tasks.take_matched(task_id, close=True)) is not None:
                tasks.end(task, KVResponseStatus.CANCELLED)
            elif (running := tasks.running.get(task_id)) is not None:
                tasks.client.cancel(running.job)
            elif (batch := tasks.batches.get(task_id)) is not None:
                for one in batch.tasks:
                    if one.id in tasks.running:
                        tasks.client.cancel(one.job)

    @_one_at_a_time
    def reset(self) -> None:
        """Forgets all blocks of this model, as after its weights have changed. What runs goes on and keeps nothing.
        Puts that were matched and not launched have failed: what they would keep is of before."""
        tasks = self._running_tasks()
        for task in [task for task in tasks.matched.values() if task.save]:
            tasks.take_matched(task.id, close=True)
            tasks.end(task, KVResponseStatus.FAILED, "reset")
        tasks.client.reset()

    # ---- who this is

    def _running_tasks(self) -> Tasks:
        if self._tasks is None:
            raise RuntimeError("this KVManager is not started, or was shut down")
        return self._tasks

    def _model_name(self) -> str:
        model = self._model
        return model.identity or f"{model.num_layers} layers, {model.num_kv_heads} heads of {model.head_size}"

    def _fingerprint(self) -> bytes:
        """Of all that KV bytes depend on besides tokens and namespaces."""
        model, settings = self._model, self._settings
        facts: dict[str, Any] = {
            "format": 1,
            "model": [model.num_layers, model.num_kv_heads, model.head_size, model.kv_dim, str(model.dtype)],
            "parallel": [model.tp_size, model.pp_size, model.dp_size, model.effective_cp_size, model.enable_dp_attention],
            "block_tokens": self._cache.tokens_per_block,
            "identity": model.identity,
            "namespace": settings.namespace,
        }
        # An embedded cache without drives or a cluster lives and dies with its engine: there is nobody to be mixed with.
        shared = self._place.mode == "daemon" or settings.reaches_beyond_memory
        if shared and not model.identity and not settings.namespace:
            logger.warning(
                "KVManager: this cache outlives the engine, and ModelConfig.identity does not name the model and its "
                "weights: nothing that is kept now will be found by another process or after a restart. Set it, or "
                "FLEXKV_NAMESPACE"
            )
            facts["identity"] = os.urandom(32).hex()
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def _id_list(task_ids: int | Iterable[int]) -> list[int]:
    return [int(task_ids)] if isinstance(task_ids, (int, np.integer)) else [int(one) for one in task_ids]
