"""The worker side, one per rank: registers the KV pool with a rank agent, lets transfers run at the right moment,
reports loads. The executor's loop calls everything here from its thread.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from flexkv import _core
from flexkv.config import Settings
from flexkv.integration.tensorrt_llm.metadata import Place, StepMeta
from flexkv.node_sockets import somebody_listens

logger = logging.getLogger("flexkv.tensorrt_llm")

_ATTACH_SECONDS = 2.0


class WorkerSide:
    def __init__(self, settings: Settings, rank: int, rank_count: int, failed_loads_are_told: bool) -> None:
        self._settings = settings
        self._rank = rank
        self._rank_count = rank_count
        self._failed_loads_are_told = failed_loads_are_told
        self._pool: torch.Tensor | None = None
        self._place: Place | None = None
        self._agent: Any = None
        self._step = 0
        self._unarmed_loads: list[int] = []
        self._unarmed_saves: list[int] = []
        self._running: dict[int, int] = {}  # loads that have not ended: job, request
        self._outcomes: dict[int, bool] = {}  # of loads that have, by request, until the engine asks for them
        self._awaited: set[int] = set()  # requests whose loads the engine has asked for
        self._held: set[int] = set()  # finished requests whose blocks the engine keeps until we report them
        self._failed: set[int] = set()

    def register_kv_caches(self, pool: torch.Tensor, place: Place | None) -> None:
        """`place`: if the scheduler side is in this process; other ranks learn it with the first step."""
        self.shutdown()
        self._pool = pool
        self._place = None
        if place is not None:
            self._attach(place)
            # What is computed before is not kept; it is a matter of milliseconds where the node runs.
            if somebody_listens(os.path.join(self._settings.node_target.runtime_dir, f"{place.node}.sock")):
                self._agent.wait_attached(_ATTACH_SECONDS)

    def _attach(self, place: Place) -> None:
        """Comes to the node, unless it is there already or there is no memory yet."""
        if place == self._place or self._pool is None:
            return
        self._fail_all_loads()
        self.shutdown()
        self._place = place
        pool = self._pool
        options = {
            "runtime_dir": self._settings.node_target.runtime_dir,
            "node_name": place.node,
            "engine_id": place.engine_id,
            "rank": self._rank,
            "rank_count": self._rank_count,
            "load_timeout_ms": self._settings.load_timeout_ms,
            "save_timeout_ms": self._settings.save_timeout_ms,
            "log_level": self._settings.log_level,
        }
        tensor = {
            "name": "pool",
            "address": pool.data_ptr(),
            "element_bytes": pool.element_size(),
            "shape": list(pool.shape),
            "stride": list(pool.stride()),
        }
        device = "host" if pool.device.type == "cpu" else f"{pool.device.type}:{pool.device.index or 0}"
        self._agent = _core.RankAgent(options, [tensor], pool.shape[0], device)
        for line in self._agent.layout().splitlines():
            logger.info("FlexKV: KV memory on %s, %d blocks: %s", device, pool.shape[0], line)

    # ---- one step

    def bind_connector_meta(self, meta: StepMeta) -> None:
        """Before the step's forward."""
        if meta.place is None or meta.step <= self._step:
            return
        self._step = meta.step
        try:
            self._attach(meta.place)
        finally:
            # Of a step that never ran nothing was written.
            if self._unarmed_saves and self._agent is not None:
                self._agent.cancel(self._unarmed_saves)
            self._unarmed_saves = meta.saves if self._agent is not None else []
            for load in meta.loads:
                if self._agent is None or load.job == 0:
                    self._outcomes[load.request_id] = False
                else:
                    self._running[load.job] = load.request_id
                    self._unarmed_loads.append(load.job)
            self._revoke(meta.revoked_loads)

    def _revoke(self, jobs: list[int]) -> None:
        """Waits until the loads write nothing any more, which takes them a chunk at most."""
        if not jobs:
            return
        for job in jobs:
            if (request_id := self._running.pop(job, None)) is not None:
                self._awaited.discard(request_id)
        self._unarmed_loads = [job for job in self._unarmed_loads if job not in jobs]
        if self._agent is not None:
            self._agent.cancel(jobs)
            self._agent.fence(jobs, 0)

    def start_loads(self, stream: Any) -> None:
        """Lets the loads run once the stream has got here."""
        if self._unarmed_loads and self._agent is not None:
            self._agent.arm_loads(self._unarmed_loads, _handle(stream))
        self._unarmed_loads = []

    def start_saves(self, stream: Any) -> None:
        """After the step's forward was given to the stream."""
        if self._unarmed_saves and self._agent is not None:
            self._agent.arm_saves(self._unarmed_saves, _handle(stream))
        self._unarmed_saves = []

    # ---- what has ended

    def get_finished(self, finished: list[int], loading: list[int]) -> tuple[list[int], list[int]]:
        """Of the requests that the engine has named here, now or before, those that it may go on with: freed, and
        loaded. Each is named once, and never one whose load has failed."""
        self.start_loads(None)  # where a step was told of, and then not begun
        self._awaited.update(loading)
        self._held.update(finished)
        self._awaited -= self._held
        for job, ok, _ in self._agent.take_loads() if self._agent is not None else ():
            if (request_id := self._running.pop(job, None)) is not None:
                self._outcomes[request_id] = ok
        loaded = []
        for request_id in self._awaited & self._outcomes.keys():
            self._awaited.discard(request_id)
            if self._outcomes.pop(request_id):
                loaded.append(request_id)
            else:
                self._tell_failure(request_id)
        quiet = list(self._held - set(self._running.values())) if self._held else []
        self._held.difference_update(quiet)
        for request_id in quiet:
            self._outcomes.pop(request_id, None)
        return quiet, loaded

    def _tell_failure(self, request_id: int) -> None:
        if self._failed_loads_are_told:
            self._failed.add(request_id)
            logger.warning("FlexKV: the cached KV of request %s could not be loaded on rank %d", request_id, self._rank)
            return
        logger.error(
            "FlexKV: the cached KV of request %s could not be loaded on rank %d. TensorRT-LLM gives a connector no way "
            "to say so, and what was not loaded must not be used: the request waits until its client gives up",
            *(request_id, self._rank),
        )

    def take_failed_load_request_ids(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def _fail_all_loads(self) -> None:
        self._outcomes.update(dict.fromkeys(self._running.values(), False))
        self._running.clear()
        self._unarmed_loads = []

    def shutdown(self) -> None:
        """On return nothing touches the pool any more."""
        if self._agent is not None:
            self._agent.stop()
        self._agent = None


def _handle(stream: Any) -> int:
    if stream is not None:
        return int(stream.cuda_stream)
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_initialized() else 0
