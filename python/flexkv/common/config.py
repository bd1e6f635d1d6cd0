"""Where the original keeps it: see flexkv.manager."""

from flexkv.manager import CacheConfig, ModelConfig, RankInfo

__all__ = ["CacheConfig", "ModelConfig", "RankInfo"]
