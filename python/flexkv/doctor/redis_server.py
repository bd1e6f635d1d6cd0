"""The Redis server of a cluster: whether it can be the directory, and how far away it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping

from flexkv.config import Settings
from flexkv.config.cluster import is_loopback
from flexkv.config.sizes import format_size
from flexkv.doctor.finding import Finding, better, wrong
from flexkv.doctor.redis_client import RedisClient, RedisError, RedisRefusal

_OLDEST = (5, 0)  # streams
_PINGS = 20
_FAR_SECONDS = 0.05
_CLOCK_SECONDS = 1.0  # more, and lines of two logs are in the wrong order
_FULL = 0.9
_TRIAL_MILLISECONDS = 1000


def redis_place(settings: Settings) -> str:
    host = settings.redis_host
    return host if host.startswith("/") else f"{host}:{settings.redis_port}"


def not_reached(settings: Settings, error: Exception) -> Finding:
    looked_at, text = f"Redis at {redis_place(settings)}", str(error)
    if "TLS" in text:
        advice = (
            "FlexKV speaks none to Redis: give it a plain port for the nodes, or a tunnel (stunnel) on each machine"
        )
    elif "NOAUTH" in text:
        advice = "it wants a password: set redis_password (FLEXKV_REDIS_PASSWORD)"
    elif "WRONGPASS" in text or "AUTH" in text or "invalid password" in text:
        advice = "set redis_password to its password (requirepass), or to none if it has none"
    elif "DENIED" in text:
        advice = "it is in protected mode: start it with --requirepass PASSWORD and --bind ADDRESS"
    elif isinstance(error, RedisRefusal):
        advice = "see what it says"
    else:
        advice = "start it, set redis_host and redis_port, open its port (unless told, it listens for its own machine)"
    return wrong(looked_at, text, advice)


def check_redis(settings: Settings, client: RedisClient) -> Iterator[Finding]:
    """Raises RedisError if it is lost meanwhile."""
    about = _info(client)
    yield version(settings, about, _round_trip(client))
    yield writes(settings, client, about)
    yield memory(about)
    yield persistence(about)
    yield password(settings)
    yield clock(client)


def version(settings: Settings, about: Mapping[str, str], round_trip: float) -> Finding:
    looked_at = f"Redis at {redis_place(settings)}"
    number = about.get("redis_version", "")
    found = f"version {number or 'unknown'}, round trip {round_trip * 1e3:.2f} ms"
    figures = {"round_trip_s": round_trip}
    parts = number.split(".")
    if len(parts) > 1 and all(part.isdecimal() for part in parts[:2]) and tuple(map(int, parts[:2])) < _OLDEST:
        return wrong(looked_at, found, "it has no streams: Redis 5.0 or later")
    if round_trip > _FAR_SECONDS:
        return better(
            looked_at, found, "one that is nearer: nodes learn that much later of each other's blocks", figures
        )
    return Finding(looked_at, found, figures=figures)


def writes(settings: Settings, client: RedisClient, about: Mapping[str, str]) -> Finding:
    """With a key that goes by itself."""
    looked_at = "writes to Redis"
    if about.get("role") == "slave":
        return wrong(looked_at, "it is a replica, which nodes cannot write to", "set redis_host to its primary")
    try:
        client.call("SET", f"flexkv:{settings.cluster_name}:doctor", "", "PX", str(_TRIAL_MILLISECONDS))
    except RedisRefusal as error:
        advice = "see what it says"
        if "MISCONF" in str(error):
            advice = 'it cannot save itself to its drive: mend that, or CONFIG SET save "" where its append-only file works'
        elif "NOPERM" in str(error):
            advice = "its user may not: an ACL for the nodes needs ~flexkv:* and +@all"
        elif "OOM" in str(error):
            advice = "its memory is full: a larger maxmemory"
        return wrong(looked_at, str(error), advice)
    return Finding(looked_at, "taken")


def memory(about: Mapping[str, str]) -> Finding:
    looked_at = "memory of Redis"
    used, most = (int(about[key]) if about.get(key, "").isdecimal() else None for key in ("used_memory", "maxmemory"))
    policy = about.get("maxmemory_policy", "noeviction")
    if used is None or most is None:
        return Finding(looked_at, "it does not tell")
    if most == 0:
        return Finding(looked_at, f"{format_size(used)} used, no maxmemory: nothing is evicted")
    found = f"{format_size(used)} of {format_size(most)} used, maxmemory-policy {policy}"
    if policy != "noeviction":
        return wrong(
            looked_at,
            f"{found}: when it is full it drops what nodes have told, and that a reset was",
            "CONFIG SET maxmemory-policy noeviction, or a Redis of the cluster's own",
        )
    if used > _FULL * most:
        return better(
            looked_at, f"{found}: nearly full", "a larger maxmemory: about 16 bytes for each block of each node"
        )
    return Finding(looked_at, found)


def persistence(about: Mapping[str, str]) -> Finding:
    """Blocks are told again; that a reset was, is not."""
    looked_at = "persistence of Redis"
    kept = about.get("aof_enabled")
    if kept is None:
        return Finding(looked_at, "it does not tell")
    if kept == "0":
        return better(
            looked_at,
            "no append-only file: when it starts anew, nodes that were down at a reset may bring old blocks back",
            "CONFIG SET appendonly yes, on a drive that outlives it",
        )
    return Finding(looked_at, "an append-only file")


def password(settings: Settings) -> Finding:
    looked_at = "password of Redis"
    if settings.redis_password:
        return Finding(looked_at, "given, and right")
    if settings.redis_host.startswith("/") or is_loopback(settings.redis_host):
        return Finding(looked_at, "none; it is on this machine")
    return better(looked_at, "none: who reaches it can reset the cluster", "--requirepass PASSWORD, and redis_password")


def clock(client: RedisClient) -> Finding:
    """Nothing in FlexKV compares clocks of two machines; people who read logs do."""
    begun = time.time()
    seconds, microseconds = client.call("TIME")
    ended = time.time()
    ahead = int(seconds) + int(microseconds) / 1e6 - (begun + ended) / 2
    known_to = (ended - begun) / 2
    found = f"{abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    figures = {"ahead_s": ahead}
    if abs(ahead) - known_to > _CLOCK_SECONDS:
        return better(
            "clock of Redis",
            f"{found}: times in logs of both do not match (nothing else depends on it)",
            "NTP",
            figures,
        )
    return Finding("clock of Redis", found, figures=figures)


def _round_trip(client: RedisClient) -> float:
    times = []
    for _ in range(_PINGS):
        begun = time.perf_counter()
        client.call("PING")
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _info(client: RedisClient) -> dict[str, str]:
    """Empty where an ACL forbids it."""
    try:
        text = client.call("INFO")
    except RedisRefusal:
        return {}
    if not isinstance(text, bytes):
        raise RedisError("not the language of Redis")
    lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
    return {key: value for key, colon, value in lines if colon}
