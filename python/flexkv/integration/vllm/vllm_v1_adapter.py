"""The implementation behind vLLM's own `FlexKVConnectorV1`, which imports exactly this name and forwards to it.

That connector keeps the step's metadata to itself, passes no KV cache configuration, and does not forward resets,
preemptions or worker metadata; what that costs, and what `connector` does better, is in docs/engines/vllm.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from flexkv.integration.common.setup import plain_errors
from flexkv.integration.vllm import compat
from flexkv.integration.vllm.groups import UnsupportedGroups, groups_of
from flexkv.integration.vllm.guard import never_raises
from flexkv.integration.vllm.machines import why_not
from flexkv.integration.vllm.metadata import FlexKVMetadata, LoadOrder
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.setup import load_settings
from flexkv.integration.vllm.stats import FlexKVStats
from flexkv.integration.vllm.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("flexkv.vllm")

_NOTHING = FlexKVMetadata()


def ours(metadata: Any) -> FlexKVMetadata:
    """A step's metadata, empty where the engine has none for us (warm-up)."""
    return metadata if isinstance(metadata, FlexKVMetadata) else _NOTHING


class FlexKVConnectorV1Impl:
    """One per scheduler and one per worker process. Never raises; without a node, or switched off, it finds nothing."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig | None = None
    ) -> None:
        """`kv_cache_config`: vLLM's own connector does not pass it; then vLLM has one group of layers only."""
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        self._failed_blocks: set[int] = set()
        # vLLM's own connector cannot read our statistics and would only warn about them.
        self.report_stats = False
        settings = load_settings(vllm_config)
        if not settings.enable_flexkv:
            return
        if kv_cache_config is None and compat.may_sleep(vllm_config):
            # Told neither when its memory goes nor that the weights, which mostly change meanwhile, are others.
            if role == KVConnectorRole.SCHEDULER:
                logger.warning(
                    "FlexKV: not used: vLLM's sleep mode is enabled, which its own FlexKVConnectorV1 is told nothing of. "
                    'Take "kv_connector": "FlexKVConnector", '
                    '"kv_connector_module_path": "flexkv.integration.vllm.connector".'
                )
            return
        with plain_errors(logger):
            why = why_not(vllm_config, settings)
        if why is not None:
            logger.warning("FlexKV: not used: %s", why)
            return
        try:
            groups = groups_of(vllm_config, kv_cache_config)
        except UnsupportedGroups as why:
            if role == KVConnectorRole.SCHEDULER:
                logger.warning("FlexKV: not used for this model: %s", why)
            return
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = SchedulerSide(vllm_config, settings, groups)
        else:
            block_count = kv_cache_config.num_blocks if kv_cache_config is not None else None
            self.worker = WorkerSide(vllm_config, settings, groups, block_count)

    @never_raises(lambda: None)
    def shutdown(self) -> None:
        for side in (self.worker, self.scheduler):
            if side is not None:
                side.shutdown()
        self.worker = self.scheduler = None

    # ---- worker

    @never_raises(lambda: None)
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self.worker is not None:
            self.worker.register_kv_caches(kv_caches)

    @never_raises(lambda: None)
    def unregister_kv_caches(self) -> None:
        if self.worker is not None:
            self.worker.unregister_kv_caches()

    @never_raises(lambda: None)
    def restore_kv_caches(self) -> None:
        if self.worker is not None:
            self.worker.restore_kv_caches()

    @never_raises(lambda: None)
    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        if self.worker is None:
            return
        # Comes before the forward in steps that load for themselves, else maybe after it.
        meta = self._metadata(kwargs.get("scheduler_output"))
        self.worker.start_loads(meta, _layers_will_ask(forward_context))

    @never_raises(lambda: None)
    def wait_for_layer_load(self, layer_name: str) -> None:
        if self.worker is not None:
            self.worker.before_layer(layer_name)

    @never_raises(lambda: None)
    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Blocks are saved whole, after the forward."""

    @never_raises(lambda: None)
    def wait_for_save(self) -> None:
        if self.worker is not None:
            self.worker.start_saves(self._metadata(None))

    @never_raises(lambda: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self.worker is None:
            return None, None
        ended = self.worker.take_ended_loads(self._metadata(None).step)
        # Only blocks can be named as failed through this connector.
        for order, good_blocks in ended:
            self.name_failed_blocks(order, good_blocks)
        return None, {order.request_id for order, _ in ended} or None

    def name_failed_blocks(self, order: LoadOrder, good_blocks: int) -> None:
        """In this step's answer: the engine keeps those before the first one, and computes the rest."""
        self._failed_blocks.update(order.block_ids[good_blocks:])

    @never_raises(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        if self.worker is None:
            return set()
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed | self.worker.take_bad_blocks()

    @never_raises(lambda: None)
    def get_kv_connector_stats(self) -> FlexKVStats | None:
        return self.worker.stats() if self.worker is not None and self.report_stats else None

    def _metadata(self, output: Any) -> FlexKVMetadata:
        """This step's metadata. vLLM's connector keeps it: from the step's own output where that is passed, else from
        the connector, found in the worker's tree of connectors."""
        meta = ours(getattr(output, "kv_connector_metadata", None))
        return meta if meta is not _NOTHING else ours(getattr(_holder_of(self), "_connector_metadata", None))

    # ---- scheduler

    @never_raises(lambda: None)
    def on_new_request(self, request: Request) -> None:
        if self.scheduler is not None:
            self.scheduler.on_new_request(request)

    @never_raises(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self.scheduler is None:
            return 0, False
        return self.scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    @never_raises(lambda: None)
    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self.scheduler is not None:
            self.scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    @never_raises(FlexKVMetadata)
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> FlexKVMetadata:
        return self.scheduler.build_connector_meta(scheduler_output) if self.scheduler is not None else FlexKVMetadata()

    @never_raises(lambda: None)
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self.scheduler is not None:
            self.scheduler.update_connector_output(connector_output)

    @never_raises(lambda: (False, None))
    def request_finished(self, request: Request, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        if self.scheduler is not None:
            self.scheduler.request_finished(request)
        return False, None

    @never_raises(lambda: None)
    def before_engine_events(self, pool: Any) -> None:
        if self.scheduler is not None and pool is not None:
            self.scheduler.before_engine_events(pool)

    @never_raises(tuple)
    def take_events(self) -> Iterable[KVCacheEvent]:
        return self.scheduler.take_events() if self.scheduler is not None else ()

    @never_raises(lambda: False)
    def reset_cache(self) -> bool:
        return self.scheduler.reset_cache() if self.scheduler is not None else True


def _layers_will_ask(forward_context: Any) -> bool:
    """Whether wait_for_layer_load is going to be called for each layer. It is not when a full CUDA graph is replayed; and
    the V2 model runner, before it replays one, gives a context without attention metadata."""
    mode = getattr(forward_context, "cudagraph_runtime_mode", None)
    if getattr(forward_context, "attn_metadata", None) is None or mode is None:
        return False
    return mode.name in ("NONE", "PIECEWISE")


def _holder_of(impl: FlexKVConnectorV1Impl) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return None
    waiting = [get_kv_transfer_group()]
    while waiting:
        connector = waiting.pop()
        if getattr(connector, "_flexkv_connector", None) is impl:
            return connector
        waiting.extend(getattr(connector, "_connectors", ()))
    return None
