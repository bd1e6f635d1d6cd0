"""Log lines of the Python part: one form for a daemon and for an engine, that of the core's lines."""

from __future__ import annotations

import logging


def formatter(prefix: str) -> logging.Formatter:
    return logging.Formatter(
        f"%(levelname).1s %(asctime)s.%(msecs)03d [{prefix} %(process)d] %(message)s", datefmt="%m-%d %H:%M:%S"
    )
