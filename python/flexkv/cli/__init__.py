"""The `flexkv` command. Exit codes: 0 done, 1 failed, 2 wrong usage (also a wrong setting), 3 no node is
running, or none in a cluster."""

from flexkv.cli.app import main

__all__ = ["main"]
