"""The settings of a cluster: what the node gets, what is wrong and how that is said."""

from __future__ import annotations

import importlib
import socket
import sys
from pathlib import Path

import pytest

from flexkv.config import ConfigError, load
from flexkv.config.cluster import unreachable_for_others

SECRET = "/etc/flexkv/secret"


def options(**extra: object) -> dict[str, object]:
    return load(environ={}, extra=extra).node_options()


def test_a_node_is_alone_unless_told_otherwise() -> None:
    assert not [key for key in options() if "cluster" in key or "redis" in key]
    # What only describes a cluster makes none.
    assert "cluster" not in options(redis_host="10.0.0.1", cluster_secret_file=SECRET)


def test_what_the_node_gets() -> None:
    given = load(
        environ={"FLEXKV_ENABLE_P2P_SSD": "1", "FLEXKV_REDIS_PASSWORD": "p"},
        extra={
            "cluster_secret_file": SECRET,
            "cluster_name": "blue",
            "redis_host": "redis.example",
            "redis_port": "6380",
            "local_ip": "10.0.0.2",
            "peer_port": 7000,
            "node_ttl_seconds": 12,
            "node": "cache",
        },
    ).node_options()
    host = socket.gethostname().split(".")[0]
    assert {key: value for key, value in given.items() if "cluster" in key or "redis" in key or "ttl" in key} == {
        "cluster": "blue",
        "cluster_node": f"{host}-cache",
        "cluster_secret_file": SECRET,
        "cluster_listen": "10.0.0.2:7000",
        "cluster_share_host": False,
        "cluster_share_drives": True,
        "cluster_nixl_library": "",
        "cluster_mooncake_helper": [],
        "redis_host": "redis.example",
        "redis_port": 6380,
        "redis_password": "p",
        "node_ttl_seconds": 12,
    }
    assert options(enable_p2p_cpu=True, cluster_secret_file=SECRET, local_ip="::1")["cluster_listen"] == "[::1]:0"
    assert options(enable_p2p_cpu=True, cluster_secret_file=SECRET, node_id="n7")["cluster_node"] == "n7"


def test_nixl_is_found_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def library() -> object:
        given = {"enable_p2p_cpu": True, "cluster_secret_file": SECRET, "peer_transport": "nixl"}
        return options(**given)["cluster_nixl_library"]

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert library() == "libnixl_capi.so"  # the loader may know it
    (tmp_path / "nixl_cu13").mkdir()
    (tmp_path / "nixl_cu13" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert library() == "libnixl_capi.so"
    (tmp_path / ".nixl_cu13.mesonpy.libs").mkdir()
    (tmp_path / ".nixl_cu13.mesonpy.libs" / "libnixl_capi.so").touch()
    assert library() == str(tmp_path / ".nixl_cu13.mesonpy.libs" / "libnixl_capi.so")
    with pytest.raises(ConfigError, match="peer_transport"):
        options(peer_transport="rdma")


def test_mooncake_runs_in_a_process_with_the_same_python() -> None:
    given = options(enable_p2p_cpu=True, cluster_secret_file=SECRET, peer_transport="mooncake")
    assert given["cluster_mooncake_helper"] == [sys.executable, "-P", "-m", "flexkv.mooncake.reader"]
    assert given["cluster_nixl_library"] == ""


def test_a_cluster_needs_a_secret_and_an_address_of_its_own() -> None:
    with pytest.raises(ConfigError, match="cluster_secret_file: needed with enable_p2p_cpu.*umask 077"):
        options(enable_p2p_cpu=True)
    with pytest.raises(ConfigError, match="local_ip: wrong value 0.0.0.0"):
        options(enable_p2p_ssd=True, cluster_secret_file=SECRET, local_ip="0.0.0.0")


def test_a_node_that_others_cannot_reach_is_told_so() -> None:
    def warnings(**extra: object) -> list[str]:
        return unreachable_for_others(load(environ={}, extra={"cluster_secret_file": SECRET, **extra}))

    assert "local_ip" in warnings(enable_p2p_cpu=True, redis_host="10.0.0.1")[0]
    assert not warnings(enable_p2p_cpu=True)
    assert not warnings(enable_p2p_cpu=True, redis_host="10.0.0.1", local_ip="10.0.0.2")
    assert not warnings(redis_host="10.0.0.1")


def test_the_password_is_never_shown() -> None:
    with pytest.raises(ConfigError) as error:
        load(environ={"FLEXKV_REDIS_PASSWORD": "hidden\n"})
    assert "hidden" not in str(error.value)
    settings = load(environ={"FLEXKV_REDIS_PASSWORD": "hidden"})
    assert settings.show("redis_password") == "***"
    assert "hidden" not in repr(settings)
