"""Metric families of a node's cluster. A node that is alone has none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from flexkv.status_fields import entries, is_number, mapping

_DIRECTORY = {
    "blocks": "Blocks of other nodes that this one knows of",
    "memory_bytes": "Memory for what is known of other nodes",
    "spaces_loading": "Lists of other nodes' blocks that are being loaded",
    "spaces_stuck": "Lists of other nodes' blocks that cannot be followed for now",
    "told_blocks": "Blocks of this node that others are told of",
}
_SENT = {"stream_bytes": "Bytes of changes sent to Redis", "snapshot_bytes": "Bytes of snapshots sent to Redis"}
_PEERS = {
    "silent_s": ("silent_seconds", "Time since the other node's last sign of life"),
    "blocks": ("blocks", "Blocks that the other node is known to have"),
    "waiting_bytes": ("waiting_bytes", "Bytes that are being read from the other node"),
    "read_bytes_per_s": ("read_bytes_per_second", "Bytes read from the other node in a second, as measured"),
}
_FLOWS = {"read": "from other nodes", "lent": "by other nodes"}
_FLOW_COUNTERS = {
    "requests": "Requests read {}",
    "blocks": "Blocks read {}",
    "bytes": "Bytes read {}",
    "given_up": "Reads {} that were taken to have stopped",
    "one_sided_blocks": "Blocks read {} out of memory directly",
    "one_sided_failures": "Reads {} out of memory directly that failed",
}


def cluster_families(status: Mapping[str, Any]) -> Iterator[Metric]:
    cluster = mapping(status, "cluster")
    if not cluster:
        return
    directory, peers = mapping(cluster, "directory"), entries(cluster, "peers")
    families: list[GaugeMetricFamily | CounterMetricFamily] = [
        GaugeMetricFamily("flexkv_cluster_peers", "Other nodes that show signs of life", value=len(peers)),
        GaugeMetricFamily(
            "flexkv_cluster_connected", "1 if Redis answers", value=float(not directory.get("trouble"))
        ),
    ]
    families += (
        GaugeMetricFamily(f"flexkv_cluster_directory_{key}", doc, value=directory[key])
        for key, doc in _DIRECTORY.items()
        if is_number(directory.get(key))
    )
    families += (
        CounterMetricFamily(f"flexkv_cluster_directory_{key}", doc, value=directory[key])
        for key, doc in _SENT.items()
        if is_number(directory.get(key))
    )
    for key, (name, doc) in _PEERS.items():
        gauge = GaugeMetricFamily(f"flexkv_cluster_peer_{name}", doc, labels=["peer"])
        for peer in peers:
            if is_number(peer.get(key)):
                gauge.add_metric([str(peer.get("name", ""))], peer[key])
        families.append(gauge)
    for flow, whom in _FLOWS.items():
        part = mapping(cluster, flow)
        families += (
            CounterMetricFamily(f"flexkv_cluster_{flow}_{key}", doc.format(whom), value=part[key])
            for key, doc in _FLOW_COUNTERS.items()
            if is_number(part.get(key))
        )
        if is_number(part.get("under_way")):
            doc = f"Reads {whom} under way"
            families.append(GaugeMetricFamily(f"flexkv_cluster_{flow}_under_way", doc, value=part["under_way"]))
    doc = "Reads from other nodes, by how they ended"
    ended = CounterMetricFamily("flexkv_cluster_read_ended", doc, labels=["how"])
    for how, count in mapping(mapping(cluster, "read"), "ended").items():
        if is_number(count):
            ended.add_metric([str(how)], count)
    families.append(ended)
    yield from (family for family in families if family.samples)
