"""What status and metrics say of the remote tier."""

from __future__ import annotations

import io
import os
from typing import Any

import fake_core
import pytest
from flexkv.cli.status_tables import node_view
from flexkv.metrics import StatusCollector
from flexkv.metrics_remote import remote_families
from rich.console import Console

REMOTE: dict[str, Any] = {
    "url": "s3://bucket/[prefix]",
    "looked_through": 3,
    "known_blocks": 120_000,
    "known_objects": 15_000,
    "left_out_objects": 0,
    "resets": 1,
    "resets_unstored": 0,
    "reads_off": "",
    "writes_off": "8 failures in a row",
    "trouble": "",
    "last_error": "HTTP 503 SlowDown",
    "read": {
        "under_way": 2,
        "waiting_bytes": 4 << 20,
        "bytes_per_s": 2.5e9,
        "blocks": 80,
        "bytes": 80 << 20,
        "ended": {"done": 8, "missing": 1},
        "given_up": 5,
        "latency_us": {"count": 80, "sum_us": 8000, "bounds_us": [100, 200], "counts": [70, 10]},
    },
    "written": {"under_way": 1, "objects": 9, "blocks": 70, "bytes": 70 << 20, "ended": {"done": 9, "failed": 2}},
    "operations": {"gets": 10, "puts": 11, "lists": 12, "tried_again": 3},
    "scans_failed": 0,
    "faults": {"payload": 1},
    "admission": {"admitted": 70, "refused_unlikely": 41},
}
STATUS = fake_core.STATUS | {"remote": REMOTE}


def shown(status: dict[str, Any]) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(node_view(status, None, 0))
    return out.getvalue()


def test_status() -> None:
    text = shown(STATUS)
    for expected in (
        "remote tier: s3://bucket/[prefix]: 120,000 blocks known",
        "read from it: 80 blocks, 80 MiB, 2 requests under way, 2.50 GB/s while it is read; ended early: missing 1",
        "written to it: 70 blocks, 70 MiB, 1 requests under way; ended early: failed 2",
        "not worth writing to it, blocks: unlikely 41",
        "found wrong in it: payload 1",
    ):
        assert expected in text, expected
    assert "not looked through yet" in shown(fake_core.STATUS | {"remote": REMOTE | {"looked_through": 0}})
    assert "remote tier" not in shown(fake_core.STATUS)


def test_metrics() -> None:
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in StatusCollector(lambda: STATUS).collect()
        for sample in family.samples
    }
    expected = {
        ("flexkv_remote_known_blocks",): 120_000,
        ("flexkv_remote_serves", "reads"): 1,
        ("flexkv_remote_serves", "writes"): 0,
        ("flexkv_remote_read_bytes_total",): 80 << 20,
        ("flexkv_remote_read_bytes_per_second",): 2.5e9,
        ("flexkv_remote_read_ended_total", "missing"): 1,
        ("flexkv_remote_read_given_up_total",): 5,
        ("flexkv_remote_written_objects_total",): 9,
        ("flexkv_remote_written_under_way",): 1,
        ("flexkv_remote_operations_total", "tried_again"): 3,
        ("flexkv_remote_faults_total", "payload"): 1,
        ("flexkv_remote_read_latency_seconds_count",): 80,
    }
    assert {key: samples.get(key) for key in expected} == expected
    assert not list(remote_families(fake_core.STATUS))


@pytest.mark.parametrize("hole", [None, "x", [], {}])
def test_any_field_may_be_missing_or_strange(hole: Any) -> None:
    with open(os.devnull, "w") as nowhere:
        for key in REMOTE:
            status = {"remote": REMOTE | {key: hole}}
            Console(file=nowhere).print(node_view(status, None, 0))
            list(remote_families(status))
