"""What a manager is told of the model, of the cache, and of the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class ModelConfig:
    """`num_kv_heads`: of all tensor-parallel ranks together. `identity`: names the model and its weights; without it
    nothing is shared with other processes or found again after a restart, because what was computed by other weights of
    the same shape could not be told apart."""

    num_layers: int = 1
    num_kv_heads: int = 1
    head_size: int = 1
    kv_dim: int = 2
    dtype: torch.dtype = torch.bfloat16
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    enable_dp_attention: bool = False
    attn_cp_size: int = 1
    cp_size: int = 1
    nnodes: int = 1
    master_host: str = "localhost"
    master_ports: tuple[str, ...] = ("5556", "5557", "5558")
    instance_num: int = 1
    use_mla: bool | None = None
    identity: str = ""

    def __post_init__(self) -> None:
        if self.use_mla is None:
            self.use_mla = self.kv_dim == 1 and self.num_kv_heads == 1
        elif self.use_mla:
            self.kv_dim = self.num_kv_heads = 1

    def freeze(self) -> None:
        """Says what is wrong with it (ValueError)."""
        for name in ("num_layers", "num_kv_heads", "head_size", "tp_size", "pp_size", "dp_size", "cp_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name} is {getattr(self, name)}: it must be at least 1")
        if self.nnodes > 1:
            raise ValueError(
                f"ModelConfig.nnodes is {self.nnodes}: an engine whose ranks are on several machines is not supported"
            )
        if self.kv_dim not in (1, 2):
            raise ValueError(f"ModelConfig.kv_dim is {self.kv_dim}: it must be 1 or 2")

    @property
    def effective_cp_size(self) -> int:
        return max(self.cp_size, self.attn_cp_size)

    @property
    def attn_tp_size(self) -> int:
        """Ranks that share the heads of one request."""
        if not self.enable_dp_attention:
            return self.tp_size
        return max(self.tp_size // self.dp_size // self.effective_cp_size, 1)

    @property
    def effective_tp_size(self) -> int:
        return self.attn_tp_size * self.effective_cp_size

    @property
    def rank_count(self) -> int:
        """Ranks that hold the shards of one block: those of one manager."""
        return self.effective_tp_size * self.pp_size

    @property
    def total_clients(self) -> int:
        return self.instance_num * self.dp_size

    @property
    def total_gpus(self) -> int:
        return self.rank_count * self.dp_size

    @property
    def tp_size_per_node(self) -> int:
        return self.tp_size

    @property
    def bytes_per_token_per_layer(self) -> int:
        return self.num_kv_heads * self.head_size * self.kv_dim * self.dtype.itemsize

    @property
    def token_size_in_bytes(self) -> int:
        """Over all tensor-parallel ranks and layers."""
        return self.bytes_per_token_per_layer * self.num_layers


@dataclass
class CacheConfig:
    """`num_cpu_blocks`, `num_ssd_blocks`: sizes of the cache in blocks; not given, FLEXKV_CPU_CACHE_GB and
    FLEXKV_SSD_CACHE_GB (or the configuration file) say them in bytes. `host_memory_only`: get_match promises only what is
    in host memory already, so that a launched load does not depend on a drive; the rest is fetched meanwhile."""

    tokens_per_block: int = 16
    enable_cpu: bool = True
    enable_ssd: bool | None = None
    num_cpu_blocks: int | None = None
    num_ssd_blocks: int | None = None
    ssd_cache_dir: str | list[str] | None = None
    host_memory_only: bool = False
    # Asked for by engines; there is no such tier.
    enable_remote: bool = False
    enable_kv_sharing: bool = False
    num_remote_blocks: int | None = None

    def settings(self, model: ModelConfig) -> dict[str, Any]:
        """What it says of FlexKV's settings. ValueError: it asks for what does not exist."""
        if not self.enable_cpu:
            raise ValueError("CacheConfig.enable_cpu is off: there is no cache without host memory")
        if self.tokens_per_block < 1:
            raise ValueError(f"CacheConfig.tokens_per_block is {self.tokens_per_block}: it must be at least 1")
        for name in ("enable_remote", "enable_kv_sharing"):
            if getattr(self, name):
                raise ValueError(f"CacheConfig.{name} is on: remote storage is not supported yet")
        told: dict[str, Any] = {}
        if self.num_cpu_blocks:
            told["cpu_cache_gb"] = f"{max(self.num_cpu_blocks * self._slot_bytes(model), 1 << 20)}B"
        if self.enable_ssd is False:
            told["ssd_cache_gb"] = 0
        elif self.num_ssd_blocks:
            told["ssd_cache_gb"] = f"{self.num_ssd_blocks * self._slot_bytes(model)}B"
        if self.ssd_cache_dir:
            dirs = self.ssd_cache_dir
            told["ssd_cache_dir"] = dirs if isinstance(dirs, str) else ";".join(dirs)
        return told

    def _slot_bytes(self, model: ModelConfig) -> int:
        """Of one block in host memory, all ranks; each rank's share begins at a page."""
        copies = model.effective_tp_size if model.use_mla else 1  # every rank stores what it holds
        per_rank = -(-model.token_size_in_bytes * self.tokens_per_block * copies // model.rank_count)
        return -(-per_rank // 4096) * 4096 * model.rank_count


@dataclass
class RankInfo:
    """Where one rank stands within its engine."""

    model_config: ModelConfig
    tp_rank: int = 0
    pp_rank: int = 0
    dp_rank: int = 0
    cp_rank: int = 0
    attn_cp_rank: int = 0
    node_rank: int = 0
    instance_id: int = 0
    pp_start_layer: int = 0
    pp_end_layer: int = -1
    local_rank: int = 0

    @property
    def attn_tp_rank(self) -> int:
        return self.tp_rank % self.model_config.attn_tp_size

    @property
    def effective_tp_rank(self) -> int:
        return max(self.cp_rank, self.attn_cp_rank) * self.model_config.attn_tp_size + self.attn_tp_rank

    @property
    def dp_client_id(self) -> int:
        return self.instance_id * self.model_config.dp_size + self.dp_rank

    @property
    def intra_client_id(self) -> int:
        """Its number among the ranks of one manager."""
        return self.pp_rank * self.model_config.effective_tp_size + self.effective_tp_rank

    @property
    def tp_rank_per_node(self) -> int:
        return self.tp_rank

    @property
    def pp_size_per_node(self) -> int:
        return self.model_config.pp_size

    @property
    def num_layers_per_pp_stage(self) -> int:
        end = self.model_config.num_layers if self.pp_end_layer < 0 else self.pp_end_layer
        return end - self.pp_start_layer
