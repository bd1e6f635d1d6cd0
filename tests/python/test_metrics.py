import logging
import socket
import threading
import time
import urllib.request
from typing import Any

import pytest
from fake_core import STATUS
from flexkv.metrics import MetricsServer, start_metrics
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
        ("flexkv_tier_bytes", (("tier", "host"),)): 1 << 34,
        ("flexkv_space_blocks", (("model", "[red]llama"), ("space", "1"), ("state", "pinned"))): 16,
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


@pytest.mark.parametrize(
    "server",
    [
        dict,
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
        assert start_metrics(server.port, dict) is None
    assert str(server.port) in caplog.text


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
