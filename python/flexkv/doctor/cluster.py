"""A cluster and what its nodes share, as a node with these settings would meet it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

from flexkv.config import Settings
from flexkv.config.cluster import in_cluster, unreachable_for_others
from flexkv.doctor.cluster_nodes import check_nodes
from flexkv.doctor.deadline import within
from flexkv.doctor.finding import Finding, better, wrong
from flexkv.doctor.redis_client import RedisClient, RedisError
from flexkv.doctor.redis_server import check_redis, not_reached
from flexkv.doctor.shared_store import check_store

_SECONDS = 10.0  # for a local check, and for all that is asked of Redis


def check_cluster(settings: Settings, core: Any) -> Iterator[Finding]:
    if not in_cluster(settings) and not settings.remote_url:
        yield wrong(
            "cluster",
            "these settings are of no cluster (enable_p2p_cpu, enable_p2p_ssd) and have no remote tier (remote_url)",
            "give those of a node: -c FILE, or its environment",
        )
        return
    if in_cluster(settings):
        secret = check_secret(settings, core)
        yield secret
        yield own_address(settings)
        yield from _by_way_of_redis(settings, core)
    else:
        yield Finding("cluster", "none (enable_p2p_cpu and enable_p2p_ssd are off)")
    yield check_store(settings, core) if settings.remote_url else Finding("remote tier", "none (remote_url is not set)")


def check_secret(settings: Settings, core: Any) -> Finding:
    looked_at = f"secret in {settings.cluster_secret_file}"
    make = "make it once, (umask 077; openssl rand -base64 48 > FILE), and copy it to all nodes"
    try:
        within(_SECONDS, lambda: core.check_secret(settings.cluster_secret_file))
    except (RuntimeError, TimeoutError) as error:
        text = str(error)
        if "chmod" in text:
            return wrong(looked_at, text, f"chmod 600 {settings.cluster_secret_file}")
        if "Permission denied" in text:
            return wrong(looked_at, text, "run this as the user that runs the node, to whom the file has to belong")
        return wrong(looked_at, text, make)
    return Finding(looked_at, "private, and long enough; whether it is the others' is seen at each node below")


def own_address(settings: Settings) -> Finding:
    """Whether a node could listen there. Its port is left alone: a node may have it already."""
    looked_at = f"local_ip {settings.local_ip}"
    try:
        within(_SECONDS, lambda: _bind(settings.local_ip))
    except (OSError, TimeoutError) as error:
        why = getattr(error, "strerror", None) or str(error)
        return wrong(
            looked_at, f"a node cannot listen there: {why}", "set FLEXKV_LOCAL_IP to an address of this machine"
        )
    for warning in unreachable_for_others(settings):
        return wrong(
            looked_at, warning.partition(": ")[2].partition(";")[0], "set FLEXKV_LOCAL_IP to this machine's address"
        )
    port = f"port {settings.peer_port}" if settings.peer_port else "any free port (peer_port 0: mind firewalls)"
    return Finding(looked_at, f"of this machine; {port}")


def _bind(host: str) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as trial:
        trial.bind(address)


def _by_way_of_redis(settings: Settings, core: Any) -> Iterator[Finding]:
    def connect() -> RedisClient:
        deadline = time.monotonic() + _SECONDS
        return RedisClient(settings.redis_host, settings.redis_port, settings.redis_password, deadline)

    try:
        client = within(_SECONDS + 1, connect)
    except (RedisError, TimeoutError) as error:
        yield not_reached(settings, error)
        yield better("nodes of the cluster", "not known without Redis", "mend that first")
        return
    try:
        yield from check_redis(settings, client)
        yield from check_nodes(settings, core, client)
    except (RedisError, ValueError, TypeError, AttributeError, RecursionError) as error:  # what is no Redis answers anything
        yield not_reached(settings, error)
    finally:
        client.close()
