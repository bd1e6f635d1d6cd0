"""Engines on several machines: the settings, what the node gets, and what such an engine is told is wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.config import ConfigError, load
from flexkv.integration.vllm.machines import Machines, machines_of, why_not

SECRET = "/etc/flexkv/secret"


def settings(**extra: object) -> Any:
    return load(environ={}, extra={"cluster_secret_file": SECRET, "node": "default", **extra})


def config(count: int, this: int = 0, ranks: int = 8) -> Any:
    parallel = SimpleNamespace(nnodes_within_dp=count, node_rank_within_dp=this, world_size=ranks)
    return SimpleNamespace(parallel_config=parallel)


def test_what_the_node_gets() -> None:
    assert not [key for key in settings().node_options() if "engine" in key]
    given = settings(engine_listen="10.0.0.3:7500", cluster_name="blue").node_options()
    assert {key: value for key, value in given.items() if "engine" in key} == {
        "engine_listen": "10.0.0.3:7500",
        "engine_secret_file": SECRET,
        "engine_cluster": "blue",
    }


def test_addresses() -> None:
    assert settings(engine_hosts="b:1, [::1]:2,10.0.0.3:7500").engine_hosts == ("b:1", "[::1]:2", "10.0.0.3:7500")
    assert settings(engine_hosts=["b:1"]).engine_hosts == ("b:1",)
    for wrong in ("b", "b:0", "b:65536", "::1:5", "b:1,b:1", ["b:1", 5], 7):
        with pytest.raises(ConfigError, match="engine_hosts"):
            settings(engine_hosts=wrong)


@pytest.mark.parametrize("asked", ["engine_hosts", "engine_listen"])
def test_the_secret_is_needed(asked: str) -> None:
    with pytest.raises(ConfigError, match=f"cluster_secret_file: needed with {asked}"):
        load(environ={}, extra={asked: "b:1"})


def test_an_engine_that_is_not_served_is_told_why() -> None:
    assert why_not(config(1), load(environ={}, extra={})) is None
    assert why_not(config(2), settings(engine_hosts="b:1")) is None
    assert why_not(config(2, this=1), settings()) is None, "only the scheduler asks others"
    assert "start `flexkv serve`" in str(why_not(config(2, this=1), settings(node="embedded")))
    assert "FLEXKV_ENGINE_HOSTS" in str(why_not(config(3), settings()))
    with pytest.raises(ConfigError, match="on 3 machines, so 2 besides"):
        why_not(config(3), settings(engine_hosts="b:1"))


def test_each_machine_has_ranks_and_a_fingerprint_of_its_own() -> None:
    assert machines_of(config(2, this=1)) == Machines(count=2, this=1, ranks=4)
    assert machines_of(config(2, this=1)).first_rank == 4
    old = SimpleNamespace(parallel_config=SimpleNamespace(world_size=4))  # of a vLLM that knows one machine only
    assert machines_of(old) == Machines(count=1, this=0, ranks=4)
    whole = bytes(32)
    assert Machines(1, 0, 8).fingerprint(0, whole) == whole
    parts = [Machines(count, 0, 8 // count).fingerprint(i, whole) for count in (2, 4) for i in range(count)]
    assert len({whole, *parts}) == 7
