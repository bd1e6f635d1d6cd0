"""The nodes that the directory names: whether they live, can be reached and know the secret, and how far away they are."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flexkv.config import Settings
from flexkv.doctor.deadline import within
from flexkv.doctor.finding import Finding, better, wrong
from flexkv.doctor.redis_client import RedisClient

_GREETING_SECONDS = 5.0
_RECEIVE_SECONDS = 0.5
_RATES_SECONDS = 20.0  # for all rates, which are measured one after another
_AT_ONCE = 16
_NODES_MAX = 1024  # of a cluster
_SPARE_SECONDS = 1.0  # the core keeps its deadlines; this is for when it does not


@dataclass(frozen=True)
class Sign:
    """What a node has last said of itself."""

    incarnation: str
    name: str
    address: str
    spaces: int
    expires_in: float  # seconds, without another sign
    condition: str = "serves"  # or drains, drained


def check_nodes(settings: Settings, core: Any, client: RedisClient) -> Iterator[Finding]:
    """Raises RedisError."""
    looked_at = f"nodes of cluster {settings.cluster_name}"
    signs, refused, silent = _signs(settings, core, client)
    for why in sorted(set(refused)):
        yield wrong(f"signs of life in cluster {settings.cluster_name}", why, "run one version of FlexKV on all nodes")
    if not signs:
        yield better(
            looked_at,
            "nobody is there",
            "nodes join when they start; if some run: is their cluster_name the same, and their Redis?",
        )
        return
    drained = sum(sign.condition != "serves" for sign in signs)
    found = f"{len(signs)} there"
    found += f", {drained} of them drained or about to be" if drained else ""
    found += f"; {silent} that ended without a word" if silent else ""
    yield Finding(looked_at, found, figures={"nodes": len(signs), "drained": drained, "silent": silent})
    for name in sorted({sign.name for sign in signs if sum(other.name == sign.name for other in signs) > 1}):
        yield better(
            looked_at, f"several are named {name}", "give each a node_id of its own; all are served all the same"
        )
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        greeted = list(pool.map(lambda sign: _probe(settings, core, sign, 0.0), signs))
    rates_end = time.monotonic() + _RATES_SECONDS
    for sign, probed in zip(signs, greeted, strict=True):
        if isinstance(probed, dict) and time.monotonic() < rates_end:
            probed = _probe(settings, core, sign, _RECEIVE_SECONDS)
        yield node(settings, sign, probed)


_CONDITIONS = {
    "drains": "it drains: it gives nothing more, and writes what it has to",
    "drained": "it is drained: it gives nothing until it is started anew",
}


def node(settings: Settings, sign: Sign, probed: dict[str, Any] | str) -> Finding:
    """`probed`: what the core found there, or why it could not."""
    looked_at = f"node {sign.name} at {sign.address or 'no address'}"
    ttl = settings.node_ttl_seconds
    age = ttl - sign.expires_in
    life = f"sign of life {age:.0f} s ago" if age >= 0 else f"lives for {sign.expires_in:.0f} s without a sign"
    found = f"{life}, {_CONDITIONS.get(sign.condition) or f'models: {sign.spaces}'}"
    figures: dict[str, float] = {"expires_in_s": sign.expires_in, "models": sign.spaces}
    if age >= 0:
        figures["silent_s"] = age
    if isinstance(probed, str):
        return wrong(looked_at, f"{found}; {probed}", _advice(probed, sign), figures)
    if probed["node"] != sign.incarnation:
        return wrong(
            looked_at,
            f"{found}; another node is there ({probed['node']})",
            "two nodes announce one address: give each machine its own local_ip",
            figures,
        )
    greeting, round_trip = (f"{probed[key] * 1e3:.2f} ms" for key in ("greeting_s", "round_trip_s"))
    found += f"; it knows the secret; connected in {greeting}, round trip {round_trip}"
    figures |= {key: probed[key] for key in ("greeting_s", "round_trip_s")}
    if rate := probed["bytes_per_s"]:
        found += f", {rate / 1e9:.2f} GB/s from it"
        figures["bytes_per_s"] = rate
    if age > 2 * ttl / 3:
        return better(looked_at, f"{found}: it has missed a sign", "look at its log for what it says of Redis", figures)
    return Finding(looked_at, found, figures=figures)


def _advice(why: str, sign: Sign) -> str:
    if "secret" in why:
        return "give all nodes the same cluster_secret_file and cluster_name"
    if "version" in why:
        return "run one version of FlexKV on all nodes"
    advice = "its local_ip has to be an address that this machine reaches; a firewall has to let its peer_port through"
    if sign.address.startswith(("127.", "[::1]")):
        advice = "it listens for its own machine only: set its local_ip to that machine's address"
    return advice


def _probe(settings: Settings, core: Any, sign: Sign, receive_seconds: float) -> dict[str, Any] | str:
    own_name = f"doctor on {socket.gethostname()}"[:64]
    arguments = (settings.cluster_secret_file, settings.cluster_name, own_name, sign.address)
    limit = _GREETING_SECONDS + receive_seconds + _SPARE_SECONDS
    try:
        return within(limit, lambda: core.probe_peer(*arguments, _GREETING_SECONDS, receive_seconds))
    except (RuntimeError, TimeoutError) as error:
        return str(error)


def _signs(settings: Settings, core: Any, client: RedisClient) -> tuple[list[Sign], list[str], int]:
    """What can be read, why something cannot, and how many are listed that give no sign any more."""
    cluster = f"flexkv:{settings.cluster_name}:"
    epoch = client.call("GET", f"{cluster}epoch") or b"0"
    reset = client.call("GET", f"{cluster}reset") or b""
    prefix = f"{cluster}{int(epoch)}{'-' if reset else ''}{reset.decode('ascii', 'replace')}:"
    members = client.call("SMEMBERS", f"{prefix}nodes") or []
    signs, refused, silent = [], [], 0
    for member in sorted(members)[:_NODES_MAX]:
        incarnation = member.decode(errors="replace")
        place = f"{prefix}node:{incarnation}"
        expires_in, beat = client.call("PTTL", place), client.call("GET", place)
        if beat is None:
            silent += 1
            continue
        try:
            said = core.decode_heartbeat(beat, place)
        except RuntimeError as error:
            refused.append(str(error))
            continue
        if said["condition"] == "ends":
            continue
        lives = max(expires_in, 0) / 1e3
        signs.append(Sign(incarnation, said["name"], said["address"], said["spaces"], lives, said["condition"]))
    return sorted(signs, key=lambda sign: sign.name), refused, silent
