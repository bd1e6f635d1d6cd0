"""The original's own interface: a manager on the scheduler's side, a client in each process that owns KV tensors."""

from flexkv.manager.layout import KVCacheLayout, KVCacheLayoutType
from flexkv.manager.manager import KVManager
from flexkv.manager.model import CacheConfig, ModelConfig, RankInfo
from flexkv.manager.ranks import KVTPClient
from flexkv.manager.requests import KVResponse, KVResponseStatus

__all__ = [
    "CacheConfig",
    "KVCacheLayout",
    "KVCacheLayoutType",
    "KVManager",
    "KVResponse",
    "KVResponseStatus",
    "KVTPClient",
    "ModelConfig",
    "RankInfo",
]
