"""The `flexkv` command. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no node is running (`status`)."""

from flexkv.cli.app import main

__all__ = ["main"]
