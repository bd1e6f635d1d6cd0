"""The settings of the remote tier: what they are, what contradicts what, what the core gets."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexkv.config.cluster import in_cluster
from flexkv.config.setting import setting, text

if TYPE_CHECKING:
    from flexkv.config.settings import Settings

_TOPIC = "Remote tier"
_PRINTABLE = "printable text without blanks, at most 1024 characters"
_MOONCAKE_URL = "mooncake://"
_MOONCAKE = "flexkv.mooncake.store"


@dataclass(frozen=True, kw_only=True)
class RemoteSettings:
    """The part of Settings by which blocks are kept in a store that all nodes share."""

    remote_url: str = setting(
        text(
            "file:///DIRECTORY, s3://BUCKET/PREFIX or mooncake://HOST:PORT/PREFIX",
            r"(file:///|s3://[^/]|mooncake://[^/]).{0,1000}|",
        ),
        "",
        "Where blocks are kept beyond this machine, for all nodes that give the same: a directory of a shared file "
        "system, which has to exist; a bucket of an S3-compatible store; or, for nodes of a cluster, a Mooncake Store by its "
        "master, which needs `pip install mooncake-transfer-engine-non-cuda` (docs/operations/remote.md).",
        topic=_TOPIC,
        default_text="none",
    )
    remote_endpoint: str = setting(
        text("http(s)://HOST[:PORT]", r"(https?://[^/?#@ ]{1,255}/?)?"),
        "",
        "s3://: the server, unless it is Amazon's. Buckets are then part of the path. Not given: "
        "AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL. mooncake://: where the master answers over HTTP (its `-metrics_port`).",
        topic=_TOPIC,
        default_text="Amazon's of the region; port 9003 of Mooncake's master",
    )
    remote_region: str = setting(
        text("letters, digits, `-`", r"[A-Za-z0-9-]{0,64}"),
        "",
        "s3:// only: the bucket's region. Not given: AWS_REGION or AWS_DEFAULT_REGION.",
        topic=_TOPIC,
        default_text="us-east-1",
    )
    remote_access_key: str = setting(
        text(_PRINTABLE, r"\S{0,1024}"),
        "",
        "s3:// only: who signs requests. Not given: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN; if "
        "these are not there either, requests are not signed.",
        topic=_TOPIC,
        default_text="none",
        secret=True,
    )
    remote_secret_key: str = setting(
        text(_PRINTABLE, r"\S{0,1024}"),
        "",
        "The secret key that belongs to remote_access_key.",
        topic=_TOPIC,
        default_text="none",
        secret=True,
    )


def remote_options(settings: Settings) -> dict[str, bool | int | float | str | list[str]]:
    """What the core's Node takes; nothing without a remote tier."""
    if not settings.remote_url:
        return {}
    return {
        "remote_url": settings.remote_url,
        "remote_endpoint": settings.remote_endpoint,
        "remote_region": settings.remote_region,
        "remote_access_key": settings.remote_access_key,
        "remote_secret_key": settings.remote_secret_key,
        "remote_cluster": settings.cluster_name,
        "remote_secret_file": settings.cluster_secret_file,
        "remote_mooncake_helper": (
            [sys.executable, "-P", "-m", _MOONCAKE] if settings.remote_url.startswith(_MOONCAKE_URL) else []
        ),
    }


def remote_problems(settings: Settings) -> list[str]:
    found = []
    given = bool(settings.remote_access_key), bool(settings.remote_secret_key)
    if any(given) and not all(given):
        there, missing = sorted(("remote_access_key", "remote_secret_key"), key=lambda key: not settings.value(key))
        found.append(f"{missing}: needed with {there} ({settings.origin(there)}): a request is signed with both")
    if settings.remote_url.startswith(_MOONCAKE_URL) and not in_cluster(settings):
        found.append(
            f"remote_url: mooncake:// ({settings.origin('remote_url')}) is for nodes of a cluster only: Mooncake Store "
            "may lose what says that it was reset, so Redis has to know. Give enable_p2p_cpu=1, redis_host and "
            "cluster_secret_file (docs/operations/cluster.md), or a file:// or s3:// store"
        )
    if settings.remote_url:
        return found
    return found + [
        f"{key}: there is no remote_url that it could be for ({settings.origin(key)})"
        for key in ("remote_endpoint", "remote_region", "remote_access_key")
        if settings.value(key)
    ]
