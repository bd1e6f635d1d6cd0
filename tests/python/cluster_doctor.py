"""What tests of `flexkv doctor --cluster` share: real Redis servers and nodes, each on a free port."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexkv.cli.app import app
from typer.testing import CliRunner


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def redis_server(directory: Path, *options: str, port: int | None = None) -> Iterator[int]:
    """Its port. `port`: the one that the options give it, where it has no plain one."""
    listens_at = port or free_port()
    plain = [] if port else ["--port", str(listens_at)]
    kept = ["--save", "", "--appendonly", "yes", "--dir", str(directory)]
    argv = ["redis-server", *plain, "--bind", "127.0.0.1", *kept, *options]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", listens_at), 1):
                break
        assert process.poll() is None
        yield listens_at
    finally:
        process.kill()
        process.wait()


def make_secret(file: Path) -> Path:
    file.touch(mode=0o600)
    file.write_text(secrets.token_urlsafe(48))
    return file


@contextlib.contextmanager
def node(name: str, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon with the settings of this environment, which has joined its cluster."""
    from flexkv import _core

    runtime = directory / name
    runtime.mkdir(mode=0o700)
    argv = [sys.executable, "-P", "-m", "flexkv.cli", "serve", "--name", name]
    environment = os.environ | {"FLEXKV_RUNTIME_DIR": str(runtime), "FLEXKV_NODE_ID": name}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout is not None
        assert b"listens" in process.stdout.readline()
        while not json.loads(_core.query_status(str(runtime / f"{name}.sock")))["cluster"]["directory"]["joined"]:
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def doctor(expected_code: int | None, *hidden: str) -> dict[str, dict[str, Any]]:
    """The checks of `flexkv doctor --cluster` by what they looked at. `hidden`: what must not be in what it prints. Any exit
    code will do if `expected_code` is None."""
    result = CliRunner().invoke(app, ["doctor", "--cluster", "--json"])
    assert expected_code is None or result.exit_code == expected_code, result.output
    for text in hidden:
        assert text not in result.output
    checks = json.loads(result.stdout)["checks"]
    for check in checks:
        assert check["found"] and "\n" not in check["found"] + check["advice"]
        assert bool(check["advice"]) == (check["verdict"] != "ok")
    assert result.exit_code == any(check["verdict"] == "wrong" for check in checks)
    return {check["looked_at"]: check for check in checks}
