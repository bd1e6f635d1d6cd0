"""Metric families of the SSD tier. A node without one has none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from flexkv.status_fields import entries, is_number, mapping

_GAUGES = {
    "bytes": "Bytes that the directory may hold",
    "used_bytes": "Bytes of the files in the directory",
    "queued": "Requests waiting for the drive or under way",
    "quarantined_slots": "Places that failed more than once and take no more blocks",
}
_COUNTERS = {
    "blocks_written": "Blocks written to the drive",
    "blocks_read": "Blocks read from the drive",
    "bytes_written": "Bytes written to the drive, records included",
    "bytes_read": "Bytes of blocks read from the drive",
    "checksum_failures": "Blocks read that were not what was written",
    "failed_reads": "Reads that failed",
    "failed_writes": "Writes that failed",
}
_SCRUB = {
    "checked_blocks": "Blocks read and compared with their checksums by the latest check of the whole drive",
    "checked_bytes": "Bytes of them",
    "damaged_blocks": "Blocks of them that were not what was written, and are forgotten",
    "unreadable_blocks": "Blocks of them that could not be read, and are forgotten",
    "unchecked_blocks": "Blocks that it could not check",
}
_ENDURANCE = {
    "written_bytes": "Bytes ever written to the drive",
    "last_day_bytes": "Bytes written in the last 24 hours of running",
    "daily_bytes": "Bytes that may be written in a day; 0: no limit",
    "bytes_per_day": "Bytes written in a day at the present rate",
    "days_left": "Days until the drive has been written as often as it may be",
    "pressure": "How far the budget is used up: 0 not at all, 1 nothing may be written",
}


def disk_sum(status: Mapping[str, Any], key: str) -> float | None:
    """Over all drives; None without any."""
    values = [value for drive in entries(mapping(status, "disk"), "drives") if is_number(value := drive.get(key))]
    return sum(values) if values else None


def disk_families(status: Mapping[str, Any]) -> Iterator[Metric]:
    disk = mapping(status, "disk")
    drives = entries(disk, "drives")
    families: list[GaugeMetricFamily | CounterMetricFamily] = []
    for family, fields in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
        for key, doc in fields.items():
            metric = family(f"flexkv_disk_{key}", doc, labels=["directory"])
            for drive in drives:
                if is_number(drive.get(key)):
                    metric.add_metric([str(drive.get("directory", ""))], drive[key])
            families.append(metric)
    state = GaugeMetricFamily("flexkv_disk_serves", "1 if the drive does it", labels=["directory", "what"])
    for drive in drives:
        for what in ("reads", "writes"):
            if isinstance(drive.get(what), bool):
                state.add_metric([str(drive.get("directory", "")), what], float(drive[what]))
    families.append(state)
    for key, doc in (("recovered", "found on drives at a start"), ("prefetched", "read ahead from drives")):
        if is_number(disk.get(f"{key}_blocks")):
            families.append(
                CounterMetricFamily(f"flexkv_disk_{key}_blocks", f"Blocks {doc}", value=disk[f"{key}_blocks"])
            )
    if is_number(disk.get("read_bytes_per_s")):
        doc = "Bytes that drives read in a second, as measured"
        families.append(GaugeMetricFamily("flexkv_disk_read_bytes_per_second", doc, value=disk["read_bytes_per_s"]))
    choices = mapping(disk, "choices")
    chosen = CounterMetricFamily(
        "flexkv_disk_choices", "Requests with blocks on drives, by how much of them they load", labels=["loads"]
    )
    for what in ("all", "part", "none"):
        if is_number(choices.get(what)):
            chosen.add_metric([what], choices[what])
    families.append(chosen)
    if is_number(choices.get("recomputed_blocks")):
        doc = "Blocks that were kept and that engines were expected to compute faster"
        families.append(
            CounterMetricFamily("flexkv_disk_recomputed_blocks", doc, value=choices["recomputed_blocks"])
        )
    scrub = mapping(disk, "scrub")
    for key, doc in _SCRUB.items():
        counter = CounterMetricFamily(f"flexkv_disk_scrub_{key}", doc, labels=["directory"])
        for drive in entries(scrub, "drives"):
            if is_number(drive.get(key)):
                counter.add_metric([str(drive.get("directory", ""))], drive[key])
        families.append(counter)
    if is_number(scrub.get("blocks")):
        doc = "1 while all blocks on drives are being checked"
        families.append(
            GaugeMetricFamily("flexkv_disk_scrub_running", doc, value=float(scrub.get("state") == "running"))
        )
        doc = "Blocks that the latest check has to do with"
        families.append(GaugeMetricFamily("flexkv_disk_scrub_blocks", doc, value=scrub["blocks"]))
    for key, doc in _ENDURANCE.items():
        gauge = GaugeMetricFamily(f"flexkv_disk_endurance_{key}", doc, labels=["directory"])
        for drive in drives:
            value = mapping(drive, "endurance").get(key)
            if is_number(value):
                gauge.add_metric([str(drive.get("directory", ""))], value)
        families.append(gauge)
    admission = CounterMetricFamily("flexkv_disk_admission_blocks", "Blocks offered to drives", labels=["decision"])
    for decision, count in mapping(disk, "admission").items():
        if is_number(count):
            admission.add_metric([str(decision)], count)
    families.append(admission)
    yield from (family for family in families if family.samples)
