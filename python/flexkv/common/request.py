"""Where the original keeps it: see flexkv.manager."""

from flexkv.manager import KVResponse, KVResponseStatus

__all__ = ["KVResponse", "KVResponseStatus"]
