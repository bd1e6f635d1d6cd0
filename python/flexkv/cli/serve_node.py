"""`flexkv serve`: a node as a process of its own."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from flexkv.cli.common import EXIT_USAGE, fail, require_core
from flexkv.cli.disk_files import split_directories
from flexkv.config import ConfigError, Settings, load, untold
from flexkv.config.sizes import format_size
from flexkv.logs import formatter
from flexkv.metrics import MetricsServer, start_metrics
from flexkv.node_start import start_node
from flexkv.status_fields import CLUSTER_OFF, SSD_OFF, entries, is_number, mapping, messages, undone

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
    events: str | None = None
    events_replay: str | None = None


def run(given: Options, config: Path | None) -> None:
    try:
        settings = _settings(given, config)
    except ConfigError as error:
        fail(error, EXIT_USAGE)
    _set_up_logging(settings)
    for warning in untold(settings):
        logging.getLogger("flexkv.config").warning("%s", warning)
    core = require_core()
    try:
        # Before the node starts: a signal that comes while it does must stop it too.
        with _stop_descriptor() as stop:
            _serve(core, settings, stop)
    except ConfigError as error:
        fail(error, EXIT_USAGE)
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
        "kv_events_endpoint": given.events,
        "kv_events_replay_endpoint": given.events_replay,
        "node": given.name,
    }
    options = {key: value for key, value in values.items() if value is not None}
    if given.ssd_dirs:
        options["ssd_cache_dir"] = split_directories(given.ssd_dirs)
    settings = load(file=config, extra=options, extra_origin="command line")
    if settings.node_target.mode == "embedded":
        # A daemon is what was asked for, whatever the environment tells the engines.
        settings = load(file=config, extra={**options, "node": "default"}, extra_origin="command line")
    return settings


def _serve(core: Any, settings: Settings, stop: int) -> None:
    target = settings.node_target
    node = start_node(core, settings, "daemon", target.name)
    metrics: MetricsServer | None = None
    publisher = None
    try:
        if settings.kv_events_endpoint:
            publisher = _publish_events(settings, node)
        if settings.enable_metrics:
            origin = settings.origin("metrics_port")
            metrics = start_metrics(
                settings.metrics_port, lambda: json.loads(node.status()), origin, settings.metrics_host
            )
        status = json.loads(node.status())
        pool = mapping(status, "pool")
        size, pages = pool.get("bytes", settings.cpu_cache_bytes), pool.get("page_kind", "unknown")
        print(
            f"flexkv: node {target.name} listens on {target.socket}, "
            f"pool {format_size(size)} in {pages}, {_ssd(settings, status)}{_cluster(status)}"
            f"{_events(settings, publisher)}pid {os.getpid()}",
            flush=True,
        )
        node.wait(stop)
        print(f"flexkv: node {target.name} stops ({_signal_name(stop)})", flush=True)
        if not node.drain(settings.drain_timeout_seconds):
            left = undone(mapping(mapping(json.loads(node.status()), "node"), "drain"))
            logging.getLogger("flexkv.node").warning(
                "drain_timeout_seconds (%s) are over, and something is left: %s", settings.drain_timeout_seconds, left
            )
    finally:
        if publisher is not None:
            publisher.close()
        if metrics is not None:
            metrics.close()
        node.stop()


def _publish_events(settings: Settings, node: Any) -> Any:
    """None where an endpoint cannot be had, which is a warning: never fatal."""
    try:
        from flexkv.kv_publisher import KvEventPublisher
    except ImportError as error:
        raise RuntimeError(f"kv_events_endpoint needs pyzmq and msgspec ({error}): pip install 'flexkv[events]'") from None
    try:
        return KvEventPublisher(
            node.follow(), settings.kv_events_endpoint, settings.kv_events_replay_endpoint, settings.kv_events_topic
        )
    except OSError as error:
        logging.getLogger("flexkv.events").warning(
            "%s; no KV events: give another endpoint (kv_events_endpoint and kv_events_replay_endpoint, --events and "
            "--events-replay)",
            error,
        )
        return None


def _ssd(settings: Settings, status: Mapping[str, Any]) -> str:
    """What became of the drives that were asked for."""
    if settings.ssd_cache_bytes == 0:
        return ""
    drives = entries(mapping(status, "disk"), "drives")
    usable = [drive for drive in drives if drive.get("reads") is not False]
    lost = [_named(str(drive.get("directory")), str(drive.get("why"))) for drive in drives if drive.get("reads") is False]
    if not usable:
        why = lost or messages(status, SSD_OFF) or ["see the log"]
        return f"SSD cache OFF ({'; '.join(why)}; `flexkv doctor` says more), "
    size = sum(value for drive in usable if is_number(value := drive.get("bytes")))
    but = f" (not in {'; '.join(lost)}; `flexkv doctor` says more)" if lost else ""
    return f"SSD cache {format_size(int(size))} in {', '.join(str(drive.get('directory')) for drive in usable)}{but}, "


def _events(settings: Settings, publisher: Any) -> str:
    if not settings.kv_events_endpoint:
        return ""
    return f"KV events at {settings.kv_events_endpoint}, " if publisher is not None else "KV events OFF, "


def _named(directory: str, why: str) -> str:
    return why if directory in why else f"{directory}: {why}"


def _cluster(status: Mapping[str, Any]) -> str:
    why = messages(status, CLUSTER_OFF)
    return f"cluster OFF ({'; '.join(why)}), " if why else ""


def _signal_name(stop: int) -> str:
    """Of the one that ended the wait: Python writes its number to the descriptor."""
    try:
        return signal.Signals(os.read(stop, 1)[0]).name
    except (OSError, ValueError, IndexError):
        return "asked to"


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
        handler.setFormatter(formatter(settings.logging_prefix))
