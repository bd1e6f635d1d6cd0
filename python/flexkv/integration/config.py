"""FlexKVConfig: what an engine's adapter makes of FlexKV's settings and of the engine's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flexkv.manager import CacheConfig, ModelConfig, RankInfo
from flexkv.manager.place import DEFAULT_PORT, gpu_register_port, load_settings


@dataclass
class FlexKVConfig:
    """Made by from_env(), completed by the post_init_ of the engine."""

    enable_flexkv: bool
    cache_config: CacheConfig
    model_config: ModelConfig = field(default_factory=ModelConfig)
    server_recv_port: str = DEFAULT_PORT
    gpu_register_port: str = field(default_factory=lambda: gpu_register_port(""))

    @classmethod
    def from_env(cls) -> FlexKVConfig:
        """From FLEXKV_* and the file FLEXKV_CONFIG_PATH. Raises ConfigError, with all problems at once."""
        settings = load_settings()
        # Sizes stay with the settings, in bytes: how large a block is, is not known yet. None: nothing else than those say.
        return cls(settings.enable_flexkv, CacheConfig(enable_ssd=settings.ssd_cache_bytes > 0 or None))

    def post_init_from_sglang_config(
        self,
        sglang_config: Any,
        server_args: Any,
        page_size: int,
        tp_rank: int,
        pp_rank: int,
        dp_rank: int,
        attn_cp_rank: int = 0,
    ) -> RankInfo:
        """For one rank of an SGLang engine. ValueError: an engine that this door cannot serve."""
        from flexkv.integration.sglang.config import complete

        return complete(self, sglang_config, server_args, page_size, tp_rank, pp_rank, dp_rank, attn_cp_rank)
