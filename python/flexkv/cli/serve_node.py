"""`flexkv serve`: a node as a process of its own."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from flexkv.cli.common import fail, require_core
from flexkv.config import ConfigError, Settings, load
from flexkv.config.sizes import format_size
from flexkv.metrics import MetricsServer, start_metrics

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(name: str | None, cpu_cache: str | None, config: Path | None) -> None:
    try:
        settings = _settings(name, cpu_cache, config)
    except ConfigError as error:
        fail(error)
    _set_up_logging(settings)
    core = require_core()
    options = settings.node_options()
    try:
        # Before the node starts: a signal that comes while it does must stop it too.
        with _stop_descriptor() as stop:
            _serve(core, settings, options, stop)
    except (RuntimeError, OSError, ValueError, MemoryError) as error:
        fail(str(error) or type(error).__name__)


def _settings(name: str | None, cpu_cache: str | None, config: Path | None) -> Settings:
    if name == "embedded":
        raise typer.BadParameter("'embedded' means a node inside an engine; choose another name", param_hint="--name")
    options: dict[str, str] = {}
    if cpu_cache is not None:
        options["cpu_cache_gb"] = cpu_cache
    if name is not None:
        options["node"] = name
    settings = load(file=config, extra=options, extra_origin="command line")
    if settings.node_target.mode == "embedded":
        # A daemon is what was asked for, whatever the environment tells the engines.
        settings = load(file=config, extra={**options, "node": "default"}, extra_origin="command line")
    return settings


def _serve(core: Any, settings: Settings, options: dict[str, Any], stop: int) -> None:
    node = core.Node(options)
    metrics: MetricsServer | None = None
    try:
        node.listen(options["runtime_dir"], options["node_name"])
        if settings.enable_metrics:
            metrics = start_metrics(settings.metrics_port, lambda: json.loads(node.status()))
        pool = json.loads(node.status()).get("pool", {})
        size, pages = pool.get("bytes", options["pool_bytes"]), pool.get("page_kind", "unknown")
        print(
            f"flexkv: node {options['node_name']} listens on {settings.node_target.socket}, "
            f"pool {format_size(size)} in {pages}, pid {os.getpid()}",
            flush=True,
        )
        node.wait(stop)
    finally:
        if metrics is not None:
            metrics.close()
        node.stop()


@contextmanager
def _stop_descriptor() -> Iterator[int]:
    """A descriptor that becomes readable at the first SIGTERM or SIGINT; the second ends the process as usual."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # Python writes to the wake-up descriptor when the signal comes, and calls this when the core has returned.
    def let_next_one_kill(*_: object) -> None:
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, let_next_one_kill) for number in _STOP_SIGNALS}
    previous_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(previous_wakeup)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _set_up_logging(settings: Settings) -> None:
    logger = logging.getLogger("flexkv")
    logger.setLevel(settings.log_level.upper())
    for handler in logger.handlers:
        handler.setFormatter(
            logging.Formatter(f"%(levelname).1s %(asctime)s [{settings.logging_prefix} %(process)d] %(message)s")
        )
