import logging
import socket
import threading
import time
import urllib.request
from typing import Any

import pytest
from fake_core import DISK, STATUS, WITH_DISK
from flexkv.metrics import MetricsServer, start_metrics
from flexkv.status_fields import buckets
from prometheus_client.parser import text_string_to_metric_families


def scrape(server: MetricsServer) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Any:
    started = start_metrics(0, request.param)
    assert started is not None
    yield started
    started.close()


@pytest.mark.parametrize("server", [lambda: STATUS], indirect=True)
def test_a_full_status(server: MetricsServer) -> None:
    samples = scrape(server)
    direction = ("direction", "to_device")
    expected = {
        ("flexkv_up", ()): 1,
        ("flexkv_node_info", (("mode", "daemon"), ("name", "default"), ("version", "9.9"))): 1,
        ("flexkv_uptime_seconds", ()): 4000.5,
        ("flexkv_resets_total", ()): 3,
        ("flexkv_tier_bytes", (("tier", "host"),)): 1 << 34,
        ("flexkv_space_blocks", (("model", "[red]llama"), ("space", "1"), ("state", "reserved"))): 16,
        ("flexkv_engine_ranks", (("engine", "e1"), ("model", "llama"), ("state", "attached"))): 1,
        ("flexkv_lookups_total", ()): 10,
        ("flexkv_lookup_blocks_hit_total", ()): 900,
        ("flexkv_lookup_miss_blocks_total", (("reason", "evicted"),)): 10,
        ("flexkv_save_refused_blocks_total", (("reason", "pool_full"),)): 3,
        ("flexkv_loads_total", ()): 9,
        ("flexkv_transfer_bytes_total", (direction,)): 4_000_500_000,
        ("flexkv_transfer_latency_seconds_bucket", (direction, ("le", "0.0001"))): 6,
        ("flexkv_transfer_latency_seconds_bucket", (direction, ("le", "0.001"))): 8,
        ("flexkv_transfer_latency_seconds_bucket", (direction, ("le", "+Inf"))): 9,
        ("flexkv_transfer_latency_seconds_count", (direction,)): 9,
        ("flexkv_transfer_latency_seconds_sum", (direction,)): pytest.approx(0.0011),
        ("flexkv_queue_depth", (("queue", "saves"),)): 1,
        ("flexkv_healthy", ()): 0,
    }
    assert {key: samples.get(key) for key in expected} == expected


@pytest.mark.parametrize("server", [lambda: WITH_DISK], indirect=True)
def test_drives(server: MetricsServer) -> None:
    samples = scrape(server)
    directory = ("directory", "/mnt/[a]")
    direction = ("direction", "from_disk")
    expected = {
        ("flexkv_tier_bytes", (("tier", "ssd"),)): 2 << 40,
        ("flexkv_tier_used_bytes", (("tier", "ssd"),)): 1 << 39,
        ("flexkv_evicted_blocks_total", (("tier", "host"),)): 11,
        ("flexkv_evicted_blocks_total", (("tier", "ssd"),)): 5,
        ("flexkv_space_blocks", (("model", "[red]llama"), ("space", "1"), ("state", "disk_used"))): 120_000,
        ("flexkv_disk_queued", (directory,)): 7,
        ("flexkv_disk_bytes_written_total", (directory,)): 6 << 30,
        ("flexkv_disk_checksum_failures_total", (directory,)): 1,
        ("flexkv_disk_serves", (("directory", "/mnt/b"), ("what", "reads"))): 1,
        ("flexkv_disk_serves", (("directory", "/mnt/b"), ("what", "writes"))): 0,
        ("flexkv_disk_recovered_blocks_total", ()): 120_000,
        ("flexkv_disk_prefetched_blocks_total", ()): 6,
        ("flexkv_disk_read_bytes_per_second", ()): 3.5e9,
        ("flexkv_disk_choices_total", (("loads", "all"),)): 41,
        ("flexkv_disk_choices_total", (("loads", "none"),)): 2,
        ("flexkv_disk_recomputed_blocks_total", ()): 333,
        ("flexkv_disk_endurance_days_left", (directory,)): 600.5,
        ("flexkv_disk_endurance_pressure", (directory,)): 0.25,
        ("flexkv_disk_endurance_last_day_bytes", (directory,)): 1 << 37,
        ("flexkv_disk_admission_blocks_total", (("decision", "admitted"),)): 100,
        ("flexkv_disk_scrub_checked_blocks_total", (directory,)): 900,
        ("flexkv_disk_scrub_damaged_blocks_total", (directory,)): 2,
        ("flexkv_disk_scrub_running", ()): 0,
        ("flexkv_disk_scrub_blocks", ()): 1000,
        ("flexkv_lookup_disk_blocks_hit_total", ()): 321,
        ("flexkv_transfer_blocks_total", (direction,)): 2000,
        ("flexkv_transfer_failed_blocks_total", (direction, ("reason", "deadline"))): 3,
        ("flexkv_transfer_latency_seconds_bucket", (direction, ("le", "0.0005"))): 500,
        ("flexkv_transfer_latency_seconds_bucket", (direction, ("le", "+Inf"))): 2000,
    }
    assert {key: samples.get(key) for key in expected} == expected


@pytest.mark.parametrize("server", [lambda: STATUS | {"disk": None}], indirect=True)
def test_no_drives_no_families(server: MetricsServer) -> None:
    assert not [key for key in scrape(server) if "disk" in key[0] or ("tier", "ssd") in key[1]]


@pytest.mark.parametrize(
    ("bounds", "counts", "expected"),
    [
        ([1, 2], [3, 4], [(1, 3), (2, 7), (float("inf"), 7)]),
        ([1, 2], [3, 4, 5], [(1, 3), (2, 7), (float("inf"), 12)]),
        ([1, "inf"], [3, 4], [(1, 3), (float("inf"), 7)]),
        ([], [], [(float("inf"), 0)]),
        ([1, 2], [3], None),
        (["inf", 1], [3, 4], None),
        (None, [3], None),
    ],
)
def test_buckets(bounds: object, counts: object, expected: object) -> None:
    assert buckets({"bounds_us": bounds, "counts": counts}) == expected


@pytest.mark.parametrize(
    "server",
    [
        dict,
        lambda: {"disk": DISK | {"drives": [None, 3, {"directory": None, "bytes": "x"}], "admission": [1]}},
        lambda: dict.fromkeys(STATUS),
        lambda: {key: [1, "x", None] for key in STATUS},
        lambda: {"transfers": {"to_host": {"latency_us": {"bounds_us": [1], "counts": [1]}, "bytes": "many"}}},
        lambda: {"loads": {"latency_us": {"bounds_us": [1], "counts": [1, "x"]}, "a b": 1, "ok": True}},
    ],
    indirect=True,
)
def test_a_status_with_holes(server: MetricsServer) -> None:
    assert scrape(server)[("flexkv_up", ())] == 1


def failing() -> dict[str, Any]:
    raise RuntimeError("the node is gone")


@pytest.mark.parametrize("server", [failing], indirect=True)
def test_a_failing_status(server: MetricsServer) -> None:
    assert scrape(server) == {("flexkv_up", ()): 0}


@pytest.mark.parametrize("server", [dict], indirect=True)
def test_a_taken_port_is_a_warning(server: MetricsServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "flexkv"):
        assert start_metrics(server.port, dict, "env FLEXKV_METRICS_PORT") is None
    assert f"port {server.port} of 127.0.0.1 (metrics_port, env FLEXKV_METRICS_PORT)" in caplog.text
    assert "set FLEXKV_METRICS_PORT to another one, or to 0 for a free one" in caplog.text


@pytest.mark.parametrize("server", [dict], indirect=True)
def test_a_silent_client_does_not_block_the_others(server: MetricsServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)):
        assert scrape(server)[("flexkv_up", ())] == 1


@pytest.mark.parametrize("server", [dict], indirect=True)
def test_idle_costs_nothing(server: MetricsServer) -> None:
    scrape(server)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_close_ends_the_thread_and_frees_the_port() -> None:
    first = start_metrics(0, dict)
    assert first is not None
    first.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "flexkv-metrics"]
    second = start_metrics(first.port, dict)
    assert second is not None
    second.close()
