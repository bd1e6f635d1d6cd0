"""Where the original keeps it: see flexkv.manager."""

from flexkv.manager import KVManager

__all__ = ["KVManager"]
