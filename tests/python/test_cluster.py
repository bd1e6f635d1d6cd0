"""`flexkv cluster`, and what status and metrics say of a cluster."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import fake_core
import pytest
from flexkv.cli import cluster_resets
from flexkv.cli.app import app
from flexkv.cli.status_tables import node_view
from flexkv.metrics_cluster import cluster_families
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.usefixtures("clean_environment")

CLUSTER: dict[str, Any] = {
    "name": "blue",
    "node": "host-a",
    "address": "10.0.0.1:7000",
    "peers": [
        {
            "name": "host-[b]",
            "incarnation": "00000000000000ab",
            "address": "10.0.0.2:7000",
            "silent_s": 3.5,
            "blocks": 120_000,
            "waiting_bytes": 4 << 20,
            "read_bytes_per_s": 2.5e9,
            "resting": False,
        },
        {"name": "host-c", "address": "10.0.0.3:7000", "silent_s": 1.0, "blocks": 7, "resting": True},
    ],
    "directory": {
        "joined": True,
        "epoch": 2,
        "trouble": "",
        "blocks": 120_007,
        "memory_bytes": 2 << 20,
        "left_out_blocks": 0,
        "spaces_loading": 1,
        "spaces_stuck": 0,
        "told_blocks": 4_000,
        "stream_bytes": 64_000,
        "snapshot_bytes": 0,
    },
    "read": {
        "connections": 1,
        "under_way": 2,
        "requests": 9,
        "blocks": 80,
        "bytes": 80 << 20,
        "ended": {"done": 8, "busy": 1},
        "given_up": 5,
        "one_sided_failures": 6,
    },
    "lent": {"connections": 3, "under_way": 0, "requests": 4, "blocks": 30, "bytes": 30 << 20},
}
IN_CLUSTER = fake_core.STATUS | {"cluster": CLUSTER}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "flexkv._core", fake_core)
    started = fake_core.Node({"pool_bytes": 1 << 34})
    started.listen(os.environ["FLEXKV_RUNTIME_DIR"], "default")
    yield started
    started.stop()


def says(status: dict[str, Any]) -> None:
    (Path(os.environ["FLEXKV_RUNTIME_DIR"]) / "default.status").write_text(json.dumps(status))


def test_status_of_a_cluster(node: Any) -> None:
    says(IN_CLUSTER)
    result = run("cluster", "status")
    assert result.exit_code == 0, result.output
    for expected in (
        *("host-a of cluster blue, listens at 10.0.0.1:7000", "host-[b]", "10.0.0.2:7000", "120,000", "2.50 GB/s"),
        "not asked for a while",
        "knows 120,007 blocks of 2 other nodes in 2 MiB, tells of 4,000",
        "1 lists of blocks being loaded",
        "read from others: 80 blocks, 80 MiB in 9 requests, 2 under way; ended early: busy 1; taken to have stopped: 5",
        "read by others: 30 blocks, 30 MiB in 4 requests, 0 under way",
    ):
        assert expected in result.output, expected
    assert json.loads(run("cluster", "status", "--json").output) == {
        "nodes": [{"node": "default", "cluster": CLUSTER}],
        "off": {},
    }
    assert "read from others: 80 blocks" in run("status").output


def test_trouble_with_redis_is_told(node: Any) -> None:
    says(IN_CLUSTER | {"cluster": CLUSTER | {"directory": {"trouble": "10.0.0.9:6379: Connection refused"}}})
    assert "! Redis: 10.0.0.9:6379: Connection refused" in run("cluster", "status").output


def test_a_node_that_is_alone_has_no_cluster(node: Any) -> None:
    result = run("cluster", "status")
    assert result.exit_code == 3
    assert "enable_p2p_cpu" in result.stderr
    assert "read from others" not in run("status").output
    assert not list(cluster_families(fake_core.STATUS))


def test_why_the_cluster_is_off_is_told(node: Any) -> None:
    why = "cluster_secret_file /x: Permission denied"
    says(fake_core.STATUS | {"health": {"messages": ["pool is full", f"the cluster is off: {why}"]}})
    result = run("cluster", "status")
    assert (result.exit_code, result.stderr) == (1, f"flexkv: node default: the cluster is off: {why}\n")
    assert json.loads(run("cluster", "status", "--json").stdout) == {"nodes": [], "off": {"default": why}}


def test_a_wrong_name_is_told_with_those_that_run(node: Any) -> None:
    for command in (["status"], ["reset"], ["cluster", "status"], ["cluster", "reset"]):
        result = run(*command, "--name", "nope")
        assert result.exit_code == 3
        assert "no node named nope is running" in result.output
        assert "These run: default." in result.output and "flexkv serve" not in result.output


def test_no_node_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flexkv._core", fake_core)
    for command in ("status", "reset"):
        result = run("cluster", command, "--name", "x")
        assert result.exit_code == 3
        assert "no node named x is running" in result.stderr
        assert "flexkv serve --name x" in result.stderr


def test_reset_asks_the_node_and_waits_until_its_cluster_knows(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def reset(path: str) -> str:
        asked.append(path)
        # The epoch's number says nothing: it is lower where Redis came back older.
        says(IN_CLUSTER | {"cluster": CLUSTER | {"directory": {"epoch": 9 - len(asked), "told_resets": ["aa", "bb"]}}})
        return json.dumps({"node": {"last_reset": "bb"}})

    monkeypatch.setattr(fake_core, "reset", reset, raising=False)
    for command in (["cluster", "reset"], ["reset"]):
        says(IN_CLUSTER | {"cluster": CLUSTER | {"directory": {"epoch": 9, "told_resets": ["aa"]}}})
        assert run(*command).exit_code == 0
    assert [Path(path).name for path in asked] == ["default.sock"] * 2
    says(fake_core.STATUS)
    assert run("cluster", "reset").exit_code == 3
    result = run("cluster", "reset", "--name", "default")
    assert result.exit_code == 1
    assert "default.sock: this node is in no cluster" in result.stderr
    assert len(asked) == 2


def test_a_reset_that_redis_was_not_told_of_is_no_success(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(path: str) -> str:
        directory = {"epoch": 4, "told_resets": ["aa"], "trouble": "10.0.0.9:6379: Connection refused"}
        says(IN_CLUSTER | {"cluster": CLUSTER | {"directory": directory}})  # a larger number, of somebody else's reset
        return json.dumps({"node": {"last_reset": "bb"}})

    monkeypatch.setattr(fake_core, "reset", reset, raising=False)
    monkeypatch.setattr(cluster_resets, "_PATIENCE_SECONDS", 0.1)
    says(IN_CLUSTER | {"cluster": CLUSTER | {"directory": {"epoch": 3}}})
    for command in (["cluster", "reset"], ["reset"]):
        result = run(*command)
        assert result.exit_code == 1
        assert "10.0.0.9:6379: Connection refused" in result.stderr and "keep this node running" in result.stderr


@pytest.mark.parametrize("hole", [None, "x", [], {}])
def test_any_field_may_be_missing_or_strange(hole: Any) -> None:
    from rich.console import Console

    with open(os.devnull, "w") as nowhere:
        for key in CLUSTER:
            status = {"cluster": CLUSTER | {key: hole}}
            Console(file=nowhere).print(node_view(status, None, 0))
            list(cluster_families(status))


def test_metrics() -> None:
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in cluster_families(IN_CLUSTER)
        for sample in family.samples
    }
    expected = {
        ("flexkv_cluster_peers",): 2,
        ("flexkv_cluster_connected",): 1,
        ("flexkv_cluster_directory_blocks",): 120_007,
        ("flexkv_cluster_directory_stream_bytes_total",): 64_000,
        ("flexkv_cluster_peer_blocks", "host-c"): 7,
        ("flexkv_cluster_peer_read_bytes_per_second", "host-[b]"): 2.5e9,
        ("flexkv_cluster_read_bytes_total",): 80 << 20,
        ("flexkv_cluster_lent_blocks_total",): 30,
        ("flexkv_cluster_read_under_way",): 2,
        ("flexkv_cluster_read_ended_total", "busy"): 1,
        ("flexkv_cluster_read_given_up_total",): 5,
        ("flexkv_cluster_read_one_sided_failures_total",): 6,
    }
    assert {key: samples.get(key) for key in expected} == expected
    trouble = {"cluster": CLUSTER | {"directory": {"trouble": "gone"}}}
    assert {family.name: family.samples[0].value for family in cluster_families(trouble)}["flexkv_cluster_connected"] == 0

