"""The store of the remote tier: whether it lists, takes and gives, and how long that takes."""

from __future__ import annotations

import re
from typing import Any

from flexkv.config import Settings
from flexkv.config.remote import remote_options
from flexkv.doctor.deadline import within
from flexkv.doctor.finding import Finding, wrong

_STEP_SECONDS = 10.0
_STEPS = 3
_SPARE_SECONDS = 5.0  # for ending what hangs
_USER_IN_URL = re.compile(r"//[^/@\s]*@")


def check_store(settings: Settings, core: Any) -> Finding:
    """Writes the 16 bytes that nodes write when they look whether a store is back; nothing is removed."""
    looked_at = f"remote tier {_without_user(settings.remote_url)}"
    try:
        steps = within(
            _STEPS * _STEP_SECONDS + _SPARE_SECONDS, lambda: core.probe_store(remote_options(settings), _STEP_SECONDS)
        )
    except (RuntimeError, TimeoutError) as error:
        return wrong(looked_at, _without_user(str(error)), _advice(str(error)))
    times = ", ".join(f"{step['what']} {step['seconds'] * 1e3:.1f} ms" for step in steps if not step["why"])
    figures = {f"{step['what']}_s": step["seconds"] for step in steps if not step["why"]}
    failed: dict[str, list[str]] = {}  # by the reason, what failed for it
    for step in steps:
        if step["why"]:
            failed.setdefault(step["why"], []).append(step["what"])
    if not failed:
        return Finding(looked_at, times, figures=figures)
    found = "; ".join(f"{' and '.join(what)}: {why}" for why, what in failed.items())
    return wrong(looked_at, _without_user(f"{found}; {times}" if times else found), _advice(found), figures)


def _advice(why: str) -> str:
    if "is not there" in why:
        return "mount the file system, or make the directory"
    if "bucket" in why.lower() and "404" in why:
        return "make the bucket, or give another remote_url or remote_endpoint"
    if "HTTP 403" in why or "HTTP 401" in why or "credentials" in why:
        return "s3:PutObject and s3:GetObject on BUCKET/PREFIX/*, s3:ListBucket on BUCKET; is this machine's clock right?"
    if "no Mooncake master" in why or "master does not list" in why:
        return "start mooncake_master, or give its -rpc_port in remote_url and its -metrics_port in remote_endpoint"
    if "Mooncake has no room" in why:
        return "let processes lend memory to Mooncake (docs/operations/remote.md)"
    if "Permission denied" in why or "Read-only" in why:
        return "let the user that runs the node write there"
    return "see docs/operations/remote.md for what stores answer"


def _without_user(text: str) -> str:
    return _USER_IN_URL.sub("//***@", text)
