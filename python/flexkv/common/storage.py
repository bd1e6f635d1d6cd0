"""Where the original keeps it: see flexkv.manager."""

from flexkv.manager import KVCacheLayout, KVCacheLayoutType

__all__ = ["KVCacheLayout", "KVCacheLayoutType"]
