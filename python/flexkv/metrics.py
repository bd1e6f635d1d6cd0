"""Prometheus metrics of one node: its status (docs/reference/status.md), read anew at each scrape.

`start_metrics` may be called from any thread. Its server has one thread that sleeps until somebody connects, and one
for each scrape under way. It owns the port until `close`.
"""

from __future__ import annotations

import logging
import math
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from flexkv.metrics_cluster import cluster_families
from flexkv.metrics_disk import disk_families, disk_sum
from flexkv.metrics_remote import remote_families
from flexkv.status_fields import buckets, entries, is_number, mapping

_log = logging.getLogger("flexkv.metrics")

StatusFunction = Callable[[], Mapping[str, Any]]

# A client that connects and says nothing holds a thread for this long.
_REQUEST_TIMEOUT_S = 10


class StatusCollector(Collector):
    """Turns a status into metric families. A missing field is a missing sample; a failing status is `flexkv_up 0`."""

    def __init__(self, status: StatusFunction) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        try:
            families = list(_families(self._status()))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the node, the scrape gets an answer
            _log.debug("status failed: %s", error)
            families = []
        yield GaugeMetricFamily("flexkv_up", "1 if the node answered with its status", value=1 if families else 0)
        yield from families


class MetricsServer:
    """Serves http://`host`:`port`/metrics until `close`."""

    def __init__(self, port: int, status: StatusFunction, host: str) -> None:
        registry = CollectorRegistry(auto_describe=False)  # or registering would already ask for the status
        registry.register(StatusCollector(status))
        self._server = _Server((host, port), _Handler)
        self._server.set_app(make_wsgi_app(registry))
        self.port: int = self._server.server_address[1]
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="flexkv-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        with suppress(OSError):
            socket.create_connection(self._server.server_address[:2], timeout=1).close()  # wakes the thread up
        self._thread.join(timeout=_REQUEST_TIMEOUT_S)
        self._server.server_close()

    def _serve(self) -> None:
        # Not serve_forever: that wakes up twice a second for nothing.
        while not self._closing.is_set():
            self._server.handle_request()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        # Not WSGIServer's: that looks the host's name up, which takes seconds where there is no name server.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a scrape failed", exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        pass


def start_metrics(
    port: int, status: StatusFunction, origin: str = "default", host: str = "127.0.0.1"
) -> MetricsServer | None:
    """Serves metrics on `port` (0: a free one) of `host`, which the setting has from `origin`. A port that cannot be had
    is a warning and None: never fatal."""
    try:
        server = MetricsServer(port, status, host)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        _log.warning(
            "no metrics: port %d of %s (metrics_port, %s) cannot be used: %s; set FLEXKV_METRICS_PORT to another "
            "one, or to 0 for a free one",
            *(port, host, origin, why),
        )
        return None
    _log.info("metrics at http://%s:%d/metrics", host, server.port)
    return server


def _families(status: Mapping[str, Any]) -> Iterator[Metric]:
    node = mapping(status, "node")
    info = GaugeMetricFamily("flexkv_node_info", "The node that answers", labels=["name", "mode", "version"])
    info.add_metric([str(node.get(key, "")) for key in ("name", "mode", "version")], 1)
    yield info
    yield from _gauge("flexkv_uptime_seconds", "Seconds since the node started", node.get("uptime_s"))
    if is_number(node.get("resets")):
        yield CounterMetricFamily("flexkv_resets", "Times that blocks were forgotten on demand", value=node["resets"])

    pool = mapping(status, "pool")
    for key, doc in (("bytes", "Size of the tier"), ("used_bytes", "Bytes of the tier that hold blocks")):
        tiers = {"host": pool.get(key), "ssd": disk_sum(status, key)}
        yield from _labelled(GaugeMetricFamily, f"flexkv_tier_{key}", doc, "tier", tiers)
    evicted = {
        "host": mapping(status, "evictions").get("blocks"),
        "ssd": mapping(status, "disk").get("evicted_blocks"),
    }
    yield from _labelled(
        CounterMetricFamily, "flexkv_evicted_blocks", "Blocks that left the tier for others", "tier", evicted
    )
    yield from disk_families(status)
    yield from cluster_families(status)
    yield from remote_families(status)
    of_blocks = {"": mapping(mapping(status, "remote"), "read")}
    yield from _latency("flexkv_remote_read", "Until a block has come from the store", of_blocks)

    spaces = GaugeMetricFamily("flexkv_space_blocks", "Blocks of a model's space", labels=["space", "model", "state"])
    for space in entries(status, "spaces"):
        for state in ("slots", "used", "reserved", "disk_slots", "disk_used"):
            if is_number(space.get(state)):
                labels = [str(space.get("id", "")), str(space.get("model", "")), state]
                spaces.add_metric(labels, space[state])
    yield spaces

    engines = GaugeMetricFamily("flexkv_engine_ranks", "Ranks of an engine", labels=["engine", "model", "state"])
    for engine in entries(status, "engines"):
        for state, key in (("expected", "ranks"), ("attached", "attached_ranks")):
            if is_number(engine.get(key)):
                engines.add_metric([str(engine.get("id", "")), str(engine.get("model", "")), state], engine[key])
    yield engines

    for group, what in (("lookups", "lookup"), ("saves", "save"), ("loads", "load")):
        yield from _counters(f"flexkv_{what}", f"of {group}", mapping(status, group))
    yield from _transfers(mapping(status, "transfers"))
    yield from _labelled(
        GaugeMetricFamily, "flexkv_queue_depth", "Entries waiting in a queue", "queue", mapping(status, "queues")
    )
    health = mapping(status, "health").get("state")
    if isinstance(health, str):
        yield from _gauge("flexkv_healthy", "1 if the node's health is ok", 1 if health == "ok" else 0)


def _counters(prefix: str, what: str, group: Mapping[str, Any]) -> Iterator[Metric]:
    """A number becomes a counter, a mapping of names to numbers one with the label `reason`."""
    for key, value in group.items():
        name = prefix + "s" if key == "count" else f"{prefix}_{_identifier(key)}"
        doc = f"{'Number' if key == 'count' else key} {what}"
        if key == "latency_us":
            yield from _latency(prefix, f"Latency {what}", {"": group})
        elif isinstance(value, Mapping):
            yield from _labelled(CounterMetricFamily, name, doc, "reason", value)
        elif is_number(value):
            yield CounterMetricFamily(name, doc, value=value)


def _transfers(transfers: Mapping[str, Any]) -> Iterator[Metric]:
    directions = {direction: mapping(transfers, direction) for direction in transfers}
    for key in ("bytes", "blocks", "jobs", "failed"):
        values = {direction: one.get(key) for direction, one in directions.items()}
        yield from _labelled(CounterMetricFamily, f"flexkv_transfer_{key}", f"{key} of transfers", "direction", values)
    failed = CounterMetricFamily(
        "flexkv_transfer_failed_blocks", "Blocks that did not reach or leave a drive", labels=["direction", "reason"]
    )
    for direction, one in directions.items():
        for reason, count in mapping(one, "failed_blocks").items():
            if is_number(count):
                failed.add_metric([str(direction), str(reason)], count)
    if failed.samples:
        yield failed
    yield from _latency("flexkv_transfer", "From submission to completion of a transfer", directions)


def _latency(prefix: str, doc: str, directions: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    """A histogram in seconds, with the label `direction` where directions have names."""
    labels = ["direction"] if "" not in directions else []
    metric = HistogramMetricFamily(f"{prefix}_latency_seconds", doc, labels=labels)
    for direction, one in directions.items():
        latency = mapping(one, "latency_us")
        steps = buckets(latency)
        if steps is not None:
            total = latency.get("sum_us")
            in_seconds = [("+Inf" if math.isinf(bound) else f"{bound / 1e6:g}", count) for bound, count in steps]
            metric.add_metric([direction] if labels else [], in_seconds, total / 1e6 if is_number(total) else None)
    if metric.samples:
        yield metric


def _gauge(name: str, doc: str, value: Any) -> Iterator[Metric]:
    if is_number(value):
        yield GaugeMetricFamily(name, doc, value=value)


def _labelled(
    family: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    doc: str,
    label: str,
    values: Mapping[str, Any],
) -> Iterator[Metric]:
    metric = family(name, doc, labels=[label])
    for key, value in values.items():
        if is_number(value):
            metric.add_metric([str(key)], value)
    if metric.samples:
        yield metric


def _identifier(key: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", str(key))
