"""The settings of a cluster: what they are, what contradicts what, what the core gets."""

from __future__ import annotations

import ipaddress
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv.config.setting import choice, integer, setting, switch, text

if TYPE_CHECKING:
    from flexkv.config.settings import Settings

_TOPIC = "Cluster"
_NAME = text("letters, digits, `.`, `_`, `-`, at most 64", r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_NODE_NAME_MAX = 64  # bytes, in the directory
_NIXL = "libnixl_capi.so"
_MOONCAKE = "flexkv.mooncake.reader"


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """The part of Settings by which nodes of several machines find and read each other's blocks."""

    enable_p2p_cpu: bool = setting(
        switch(),
        False,
        "This node is one of a cluster: it reads blocks of other nodes, and they read those in its host memory. "
        "Needs Redis and cluster_secret_file (docs/operations/cluster.md).",
        topic=_TOPIC,
    )
    enable_p2p_ssd: bool = setting(
        switch(),
        False,
        "The same with the blocks on this node's drives. Either of both suffices to read what others give.",
        topic=_TOPIC,
    )
    cluster_secret_file: str = setting(
        text("a path", r".{1,4096}"),
        "",
        "File with what all nodes of the cluster know and nobody else does, 32 characters or more "
        "(`openssl rand -base64 48`), which only its owner may read (chmod 600). The same at all nodes: keys of blocks depend on it.",
        topic=_TOPIC,
        default_text="none",
    )
    cluster_name: str = setting(
        _NAME,
        "default",
        "Nodes of clusters with other names are strangers, in the same Redis, too.",
        topic=_TOPIC,
    )
    node_id: str = setting(
        _NAME,
        "",
        "This node's name in the cluster, for people.",
        topic=_TOPIC,
        default_text="HOSTNAME-NODE",
    )
    local_ip: str = setting(
        text("an address of this machine, or a name for it", r"[A-Za-z0-9.:_-]{1,200}"),
        "127.0.0.1",
        "Where this node listens for others, and where they reach it. The default: only from this machine.",
        topic=_TOPIC,
    )
    peer_port: int = setting(
        integer(0, 65535),
        0,
        "The port there. 0: any free one; the others learn it from Redis.",
        topic=_TOPIC,
    )
    peer_transport: str = setting(
        choice("tcp", "nixl", "mooncake"),
        "tcp",
        "How blocks travel between nodes: `tcp`, in TLS; or, where both sides have the same and as long as it works, each node reads "
        "the others' memory by itself, unencrypted (docs/operations/cluster.md). `nixl`: over RDMA where UCX finds it; only in a "
        "network in which you trust everybody, as who reaches UCX's ports can read and write this process's memory; needs "
        "`pip install nixl-cu13`. `mooncake`: over TCP, out of a process of its own; who reaches Mooncake's ports can read this "
        "node's blocks, and write nowhere; needs `pip install mooncake-transfer-engine-non-cuda`.",
        topic=_TOPIC,
    )
    redis_host: str = setting(
        text("a name, an address, or the path of a UNIX socket", r".{1,1024}"),
        "127.0.0.1",
        "The Redis server (5.0 or later) by which the nodes tell each other what they have.",
        topic=_TOPIC,
    )
    redis_port: int = setting(integer(1, 65535), 6379, "Its port.", topic=_TOPIC)
    redis_password: str = setting(
        text("printable text, at most 1024 characters", r".{0,1024}"),
        "",
        "Its password.",
        topic=_TOPIC,
        default_text="none",
        secret=True,
    )
    node_ttl_seconds: int = setting(
        integer(3, 3600),
        30,
        "So long after its last sign of life a node's blocks are not found any more. It gives three signs in "
        "that time.",
        topic=_TOPIC,
    )


def in_cluster(settings: Settings) -> bool:
    return settings.enable_p2p_cpu or settings.enable_p2p_ssd


def cluster_options(settings: Settings) -> dict[str, bool | int | float | str | list[str]]:
    """What the core's Node takes; nothing if it is alone."""
    if not in_cluster(settings):
        return {}
    host = socket.gethostname().split(".")[0]
    default = f"{host}-{settings.node_target.name}".encode()[-_NODE_NAME_MAX:].decode(errors="ignore")
    host_port = f"[{settings.local_ip}]" if ":" in settings.local_ip else settings.local_ip
    return {
        "cluster": settings.cluster_name,
        "cluster_node": settings.node_id or default,
        "cluster_secret_file": settings.cluster_secret_file,
        "cluster_listen": f"{host_port}:{settings.peer_port}",
        "cluster_share_host": settings.enable_p2p_cpu,
        "cluster_share_drives": settings.enable_p2p_ssd,
        "cluster_nixl_library": nixl_library() if settings.peer_transport == "nixl" else "",
        "cluster_mooncake_helper": (
            [sys.executable, "-P", "-m", _MOONCAKE] if settings.peer_transport == "mooncake" else []
        ),
        "redis_host": settings.redis_host,
        "redis_port": settings.redis_port,
        "redis_password": settings.redis_password,
        "node_ttl_seconds": settings.node_ttl_seconds,
    }


def nixl_library() -> str:
    """NIXL's C library in its wheel; without one, its name, which the loader may know or the core reports as missing."""
    for package in ("nixl_cu13", "nixl_cu12"):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        library = Path(spec.origin).parents[1] / f".{package}.mesonpy.libs" / _NIXL
        if library.exists():
            return str(library)
    return _NIXL


def cluster_problems(settings: Settings) -> list[str]:
    if not in_cluster(settings):
        return []
    found = []
    asked = "enable_p2p_cpu" if settings.enable_p2p_cpu else "enable_p2p_ssd"
    if not settings.cluster_secret_file:
        found.append(
            f"cluster_secret_file: needed with {asked} ({settings.origin(asked)}): nodes trust only who knows "
            "the cluster's secret. Make one with `(umask 077; openssl rand -base64 48 > FILE)` and give the same file to all nodes"
        )
    if _is_wildcard(settings.local_ip):
        found.append(
            f"local_ip: wrong value {settings.show('local_ip')} from {settings.origin('local_ip')}; allowed: the address "
            "by which the other nodes reach this machine, not one that stands for all of its addresses"
        )
    return found


def unreachable_for_others(settings: Settings) -> list[str]:
    """A warning for a node of a cluster of several machines that listens for its own machine only."""
    alone = settings.redis_host.startswith("/") or is_loopback(settings.redis_host)
    if not in_cluster(settings) or alone or not is_loopback(settings.local_ip):
        return []
    return [
        f"local_ip: with {settings.local_ip} from {settings.origin('local_ip')} no other machine can read from this "
        f"node, though Redis is at {settings.redis_host}; give this machine's address (FLEXKV_LOCAL_IP)"
    ]


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
