"""Our own connector for vLLM, with the whole connector interface. The engine stays unmodified:

    --kv-transfer-config '{"kv_connector": "FlexKVConnector", "kv_role": "kv_both",
      "kv_connector_module_path": "flexkv.integration.vllm.connector", "kv_load_failure_policy": "recompute"}'

It adds to vLLM's own FlexKVConnectorV1 (its base, so that whoever checks for that class is content): saves that run
beside the next step on every model runner, several KV cache groups, a reset that reaches the cache, failures reported
by request, statistics, sleep mode. What a vLLM does not call yet (`compat`) is simply not called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.flexkv_connector import FlexKVConnectorV1
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from flexkv.integration.vllm import compat
from flexkv.integration.vllm.guard import never_raises
from flexkv.integration.vllm.stats import COUNTS, FlexKVStats
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl, ours

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.v1.request import Request


class FlexKVConnector(FlexKVConnectorV1, SupportsHMA):
    _cache_hit_source = compat.HOST_MEMORY

    def __init__(self, vllm_config: VllmConfig, role: Any, kv_cache_config: Any) -> None:
        # Its constructor would make an implementation that knows nothing of the KV cache groups.
        super(FlexKVConnectorV1, self).__init__(vllm_config, role, kv_cache_config)
        self._flexkv_connector = FlexKVConnectorV1Impl(vllm_config, role, kv_cache_config)
        self._flexkv_connector.report_stats = True

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss later on, nothing worse."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:
        return True

    def unregister_kv_caches(self) -> None:
        self._flexkv_connector.unregister_kv_caches()

    release_kv_caches = unregister_kv_caches  # its name after 0.33

    def restore_kv_caches(self) -> None:
        self._flexkv_connector.restore_kv_caches()

    @never_raises(compat.TransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Loads by request. Where vLLM does not ask for that, it asks get_finished(), and failures come by block."""
        worker = self._flexkv_connector.worker
        if worker is None:
            return compat.TransferResults()
        ended = worker.take_ended_loads(ours(self._connector_metadata).step)
        failed = set()
        for order, good_blocks in ended:
            # By request, the engine would keep nothing.
            if good_blocks == 0:
                failed.add(order.request_id)
            else:
                self._flexkv_connector.name_failed_blocks(order, good_blocks)
        return compat.TransferResults(
            finished_recving={order.request_id for order, _ in ended}, failed_recving=failed
        )

    def on_new_request(self, request: Request) -> None:
        self._flexkv_connector.on_new_request(request)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._flexkv_connector.request_finished(request, block_ids)

    def reset_cache(self) -> bool | None:
        return self._flexkv_connector.reset_cache()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """None, unless the user asks: `"kvcache_layout": "BLHNC"` in kv_connector_extra_config makes a block one piece
        of memory on backends that can, and so one copy."""
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
        return extra.get("kvcache_layout")

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return FlexKVStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return _PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


class _PromMetrics(KVConnectorPromMetrics):
    """The same counts beside vLLM's own, at its /metrics."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._counters = {
            name: {
                engine: family.labels(*values)
                for family in [counter(name=f"vllm:flexkv_{name}", documentation=text, labelnames=labelnames)]
                for engine, values in per_engine_labelvalues.items()
            }
            for name, text in COUNTS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, by_engine in self._counters.items():
            by_engine[engine_idx].inc(transfer_stats_data.get(name, 0))
