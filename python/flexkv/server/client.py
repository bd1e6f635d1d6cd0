"""Where the original keeps it: see flexkv.manager."""

from flexkv.manager import KVTPClient

__all__ = ["KVTPClient"]
