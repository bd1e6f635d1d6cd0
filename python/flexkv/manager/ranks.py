"""KVTPClient: in each process that owns KV tensors, hands them to FlexKV's rank agent, which copies blocks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from flexkv import _core
from flexkv.manager.layout import KVCacheLayout, describe_tensors
from flexkv.manager.place import load_settings, meeting_place, rank_of
from flexkv.node_sockets import somebody_listens

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("flexkv.manager")

# Registering waits so long for a manager that runs already.
_ATTACH_SECONDS = 5.0


class KVTPClient:
    """One rank's. Thread-compatible. Its copies run on threads of their own, without the GIL."""

    def __init__(
        self,
        gpu_register_port: str,
        dp_client_id: int = 0,
        device_id: int = 0,
        pp_rank: int = 0,
        intra_client_id: int | None = None,
    ) -> None:
        """`gpu_register_port`: the manager's. `intra_client_id`: the rank's number among the manager's (pp_rank x TP size +
        TP rank); not given, the port says it, or device_id is it."""
        self._settings = load_settings()
        self._place = meeting_place(self._settings, gpu_register_port, dp_client_id)
        ranked = rank_of(gpu_register_port)
        if ranked is not None:
            self._rank, self._rank_count = ranked
        else:
            self._rank = device_id if intra_client_id is None else intra_client_id
            self._rank_count = 0  # as the manager says
        self._agent: Any = None

    def register_to_server(
        self,
        kv_caches: list[torch.Tensor],
        kv_layout: KVCacheLayout,
        override_device_id: int | None = None,
        layer_groups: Any = None,
        gpu_layouts: Any = None,
        handles_per_group: Any = None,
        swa_caches: Any = None,
        swa_layout: Any = None,
        swa_layer_groups: Any = None,
        swa_gpu_layouts: Any = None,
        swa_handles_per_group: Any = None,
        resume: bool = False,
        indexer_buffers: list[torch.Tensor] | None = None,
        indexer_layout: KVCacheLayout | None = None,
    ) -> None:
        """Hands over the tensors, which must stay where they are until suspend_gpu_mappings() or shutdown(). Called again,
        the new ones count. Returns once the manager knows them, or at once if there is none yet: it will find them.
        ValueError: tensors whose blocks cannot be told, or kinds of caches that are not supported."""
        for name, value in (
            ("layer_groups", layer_groups),
            ("gpu_layouts", gpu_layouts),
            ("handles_per_group", handles_per_group),
            ("swa_caches", swa_caches),
            ("swa_layer_groups", swa_layer_groups),
        ):
            if value is not None:
                raise ValueError(f"{name}: caches of several kinds of layers are not supported through this interface")
        tensors, block_count, device = describe_tensors(kv_caches, kv_layout)
        if indexer_buffers:
            if indexer_layout is None:
                raise ValueError("indexer_buffers need an indexer_layout")
            more, pages, _ = describe_tensors(indexer_buffers, indexer_layout)
            if pages < block_count:
                raise ValueError(f"the indexer's buffers have {pages} pages for {block_count} blocks")
            tensors += [tensor | {"name": tensor["name"].replace("kv_caches", "indexer_buffers")} for tensor in more]
        self.shutdown()
        place, settings = self._place, self._settings
        options = {
            "runtime_dir": place.runtime_dir,
            "node_name": place.node_name,
            "engine_id": place.engine_id,
            "rank": self._rank,
            "rank_count": self._rank_count,
            "load_timeout_ms": settings.load_timeout_ms,
            "save_timeout_ms": settings.save_timeout_ms,
            "log_level": settings.log_level,
        }
        self._agent = _core.RankAgent(options, tensors, block_count, device)
        for line in self._agent.layout().splitlines():
            logger.info("KV memory of rank %d on %s, %d blocks: %s", self._rank, device, block_count, line)
        if not somebody_listens(f"{place.runtime_dir}/{place.node_name}.sock"):
            return
        if not self._agent.wait_attached(_ATTACH_SECONDS):
            problem = self._agent.counters()["refusal"] or "its node does not answer"
            logger.warning("rank %d is not registered yet, and goes on trying: %s", self._rank, problem)

    def suspend_gpu_mappings(self) -> int:
        """Before the tensors' memory goes away (an engine that sleeps): on return nothing touches it. Returns how many
        ranks were suspended; register_to_server(resume=True) brings them back."""
        suspended = int(self._agent is not None)
        self.shutdown()
        return suspended

    def set_slot_mapping(self, task_id: int, slot_mapping: Any) -> None:
        """For ranks on other machines than the manager's: not supported."""
        raise RuntimeError(
            "set_slot_mapping: an engine whose pipeline stages are on several machines is not supported; start it on one"
        )

    def shutdown(self) -> None:
        """On return nothing touches the tensors."""
        if self._agent is not None:
            self._agent.stop()
            self._agent = None
