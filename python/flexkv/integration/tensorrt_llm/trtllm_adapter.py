"""The classes that TensorRT-LLM's `kv_connector_config` names. None of their methods raises; without a node, switched
off or for an engine that cannot be served, they find nothing and keep nothing. Constructors raise ConfigError for wrong
settings, and RuntimeError where an embedded node cannot be started.
"""

from __future__ import annotations

import logging
from typing import Any

from flexkv.config import Settings, load, untold
from flexkv.integration.common.guard import Guard
from flexkv.integration.common.setup import plain_errors, show_our_logs
from flexkv.integration.tensorrt_llm import bases, engine
from flexkv.integration.tensorrt_llm.metadata import Place, StepMeta
from flexkv.integration.tensorrt_llm.scheduler import SchedulerSide
from flexkv.integration.tensorrt_llm.worker import WorkerSide

logger = logging.getLogger("flexkv.tensorrt_llm")
never_raises = Guard(logger).never_raises

# The engine that was last started in this process: its own worker need not wait for the first step to know of it.
_last_place: Place | None = None


def _load_settings() -> Settings:
    with plain_errors(logger):
        settings = load()
    show_our_logs(settings.log_level, settings.logging_prefix)
    return settings


class FlexKVSchedulerConnector(bases.SchedulerBase):  # type: ignore[misc, valid-type]
    def __init__(self, config: Any) -> None:
        """`config`: TensorRT-LLM's `TorchLlmArgs`, or `ExecutorConfig` before 1.2."""
        global _last_place
        super().__init__(config)
        self._side: SchedulerSide | None = None
        settings = _load_settings()
        for warning in untold(settings):
            logger.warning("FlexKV: %s", warning)
        described = engine.read(config)
        if described.refusal:
            logger.warning("FlexKV: not used for this engine: %s", described.refusal)
        elif settings.enable_flexkv:
            self._side = SchedulerSide(described, settings)
        _last_place = self._side.place if self._side is not None else None

    @never_raises(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if self._side is None:
            return 0, False
        return self._side.get_num_new_matched_tokens(request, num_computed_tokens)

    @never_raises(lambda: None)
    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        if self._side is not None:
            self._side.update_state_after_alloc(request, block_ids)

    @never_raises(StepMeta)
    def build_connector_meta(self, scheduler_output: Any) -> StepMeta:
        return self._side.build_connector_meta(scheduler_output) if self._side is not None else StepMeta()

    @never_raises(lambda: False)
    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        return self._side.request_finished(request.request_id) if self._side is not None else False

    # Of caches with several groups of layers, which the worker refuses.

    @never_raises(lambda: None)
    def update_state_after_alloc_by_layer_group(self, request: Any, block_ids_by_layer_group: list[list[int]]) -> None:
        if len(block_ids_by_layer_group) == 1:
            self.update_state_after_alloc(request, block_ids_by_layer_group[0])

    @never_raises(lambda: False)
    def request_finished_by_layer_group(self, request: Any, cache_block_ids_by_layer_group: list[list[int]]) -> bool:
        return self.request_finished(request, [])

    @never_raises(lambda: None)
    def shutdown(self) -> None:
        if self._side is not None:
            self._side.shutdown()
        self._side = None


class FlexKVWorkerConnector(bases.WorkerBase):  # type: ignore[misc, valid-type]
    def __init__(self, config: Any) -> None:
        """`config`: as for the scheduler's."""
        super().__init__(config)
        self._side: WorkerSide | None = None
        settings = _load_settings()
        described = engine.read(config)
        if settings.enable_flexkv and not described.refusal:
            self._side = WorkerSide(settings, bases.rank(), described.rank_count, bases.FAILED_LOADS_ARE_TOLD)

    @never_raises(lambda: None)
    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        if self._side is not None:
            self._side.register_kv_caches(kv_cache_tensor, _last_place)

    @never_raises(lambda: None)
    def register_kv_cache_layout(self, layout: Any) -> None:
        """Instead of the above, where the cache is a KVCacheManagerV2."""
        logger.warning(
            "FlexKV: not used for this engine: KVCacheManagerV2 is not supported, set "
            "kv_cache_config.use_kv_cache_manager_v2 to false"
        )

    @never_raises(lambda: None)
    def bind_connector_meta(self, metadata: Any) -> None:
        super().bind_connector_meta(metadata)
        if self._side is not None and isinstance(metadata, StepMeta):
            self._side.bind_connector_meta(metadata)

    @never_raises(lambda: None)
    def start_load_kv(self, stream: Any) -> None:
        if self._side is not None:
            self._side.start_loads(stream)

    @never_raises(lambda: None)
    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Loads run beside the steps: what a forward needs has been there before it was scheduled."""

    @never_raises(lambda: None)
    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Blocks are saved whole, after the forward."""

    @never_raises(lambda: None)
    def wait_for_save(self, stream: Any) -> None:
        """Only starts them."""
        if self._side is not None:
            self._side.start_saves(stream)

    @never_raises(lambda: ([], []))
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        if self._side is None:
            return finished_gen_req_ids, []
        return self._side.get_finished(finished_gen_req_ids, started_loading_req_ids)

    @never_raises(set)
    def take_failed_load_request_ids(self) -> set[int]:
        """Asked by some branches of TensorRT-LLM only."""
        return self._side.take_failed_load_request_ids() if self._side is not None else set()

    @never_raises(lambda: None)
    def shutdown(self) -> None:
        if self._side is not None:
            self._side.shutdown()
        self._side = None
