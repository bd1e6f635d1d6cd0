"""Metric families of a node's remote tier. A node without one has none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from flexkv.status_fields import is_number, mapping

_GAUGES = {
    "known_blocks": "Blocks that the store is known to have",
    "known_objects": "Objects that the store is known to have",
    "left_out_objects": "Objects of the store that found no room in memory among the known ones",
    "resets_unstored": "Resets that the store does not know of yet",
}
_COUNTERS = {
    "looked_through": "Times that the store was looked through",
    "scans_failed": "Times that this failed",
}
_DIRECTIONS = {"read": "read from the store", "written": "written to the store"}


def remote_families(status: Mapping[str, Any]) -> Iterator[Metric]:
    remote = mapping(status, "remote")
    families: list[GaugeMetricFamily | CounterMetricFamily] = []
    for family, fields in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
        families += (
            family(f"flexkv_remote_{key}", doc, value=remote[key])
            for key, doc in fields.items()
            if is_number(remote.get(key))
        )
    serves = GaugeMetricFamily("flexkv_remote_serves", "0 while the store is left alone", labels=["what"])
    for what in ("reads", "writes"):
        if isinstance(why := remote.get(f"{what}_off"), str):
            serves.add_metric([what], 0 if why else 1)
    families.append(serves)
    for flow, done in _DIRECTIONS.items():
        part = mapping(remote, flow)
        families += (
            CounterMetricFamily(f"flexkv_remote_{flow}_{key}", f"{key.capitalize()} {done}", value=part[key])
            for key in ("blocks", "bytes", "objects")
            if is_number(part.get(key))
        )
        if is_number(part.get("under_way")):
            doc = f"Requests for blocks to be {done}, under way"
            families.append(GaugeMetricFamily(f"flexkv_remote_{flow}_under_way", doc, value=part["under_way"]))
        doc = f"Requests for blocks to be {done}, by how they ended"
        families.append(_labelled(f"flexkv_remote_{flow}_ended", doc, "how", mapping(part, "ended")))
    given_up = mapping(remote, "read").get("given_up")
    if is_number(given_up):
        doc = "Reads from the store that were taken to have stopped"
        families.append(CounterMetricFamily("flexkv_remote_read_given_up", doc, value=given_up))
    speed = mapping(remote, "read").get("bytes_per_s")
    if is_number(speed):
        doc = "Bytes read from the store in a second, as measured while it is read; 0: not yet"
        families.append(GaugeMetricFamily("flexkv_remote_read_bytes_per_second", doc, value=speed))
    doc = "Operations ordered of the store"
    families.append(_labelled("flexkv_remote_operations", doc, "what", mapping(remote, "operations")))
    families.append(_labelled("flexkv_remote_faults", "What was found wrong in it", "what", mapping(remote, "faults")))
    yield from (family for family in families if family.samples)


def _labelled(name: str, doc: str, label: str, values: Mapping[str, Any]) -> CounterMetricFamily:
    metric = CounterMetricFamily(name, doc, labels=[label])
    for key, value in values.items():
        if is_number(value):
            metric.add_metric([str(key)], value)
    return metric
