"""`flexkv serve`: a node as a process of its own."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from flexkv.cli.common import fail, require_core
from flexkv.cli.disk_files import split_directories
from flexkv.config import ConfigError, Settings, load
from flexkv.config.sizes import format_size
from flexkv.metrics import MetricsServer, start_metrics

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Options:
    """What the command line says; it wins over file and environment."""

    name: str | None = None
    cpu_cache: str | None = None
    ssd_cache: str | None = None
    ssd_dirs: list[str] = field(default_factory=list)
    ssd_dwpd: str | None = None
    ssd_tbw: str | None = None
    ssd_years: str | None = None
    ssd_direct_io: bool | None = None


def run(given: Options, config: Path | None) -> None:
    try:
        settings = _settings(given, config)
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


def _settings(given: Options, config: Path | None) -> Settings:
    if given.name == "embedded":
        raise typer.BadParameter("'embedded' means a node inside an engine; choose another name", param_hint="--name")
    values: dict[str, object] = {
        "cpu_cache_gb": given.cpu_cache,
        "ssd_cache_gb": given.ssd_cache,
        "ssd_dwpd": given.ssd_dwpd,
        "ssd_tbw": given.ssd_tbw,
        "ssd_years": given.ssd_years,
        "ssd_direct_io": given.ssd_direct_io,
        "node": given.name,
    }
    options = {key: value for key, value in values.items() if value is not None}
    if given.ssd_dirs:
        options["ssd_cache_dir"] = split_directories(given.ssd_dirs)
    settings = load(file=config, extra=options, extra_origin="command line")
    if settings.node_target.mode == "embedded":
        # A daemon is what was asked for, whatever the environment tells the engines.
        settings = load(file=config, extra={**options, "node": "default"}, extra_origin="command line")
    if given.ssd_dirs and settings.ssd_cache_bytes == 0:
        raise typer.BadParameter("without a size there is no SSD tier; add --ssd-cache SIZE", param_hint="--ssd-dir")
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
            f"pool {format_size(size)} in {pages}, {_ssd(settings)}pid {os.getpid()}",
            flush=True,
        )
        node.wait(stop)
    finally:
        if metrics is not None:
            metrics.close()
        node.stop()


def _ssd(settings: Settings) -> str:
    if settings.ssd_cache_bytes == 0:
        return ""
    return f"SSD cache {format_size(settings.ssd_cache_bytes)} in {', '.join(settings.ssd_cache_dir)}, "


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
