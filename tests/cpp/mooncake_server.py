"""Mooncake Store for tests, from the wheel: its master, a process that lends it memory, and what tests do to it.

master PORT HTTP_PORT: becomes Mooncake's master.
holder PORT BYTES: lends so much memory; says so in a line, and waits.
spoil PORT HTTP_PORT: changes a byte in the middle of each object of blocks.
remove PORT HTTP_PORT: removes all objects of blocks.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path


def master(port: str, http_port: str) -> None:
    spec = find_spec("mooncake")
    assert spec is not None and spec.origin is not None
    binary = str(Path(spec.origin).parent / "mooncake_master")
    # So long what is read is kept from eviction; a read that takes longer fails.
    ports = [f"--rpc_port={port}", f"--metrics_port={http_port}", "--metrics_host=127.0.0.1", "--rpc_address=127.0.0.1"]
    os.execv(binary, [binary, *ports, "--default_kv_lease_ttl=1000", "--minloglevel=2", "--logtostderr"])


def client(port: str, lent: int = 0) -> object:
    os.environ["MC_FORCE_TCP"] = "1"
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", lent, 16 << 20, "tcp", "", f"127.0.0.1:{port}") == 0
    return store


def holder(port: str, size: str) -> None:
    kept = client(port, int(size))
    print("lends", flush=True)
    while kept is not None:
        time.sleep(1000)


def keys(http_port: str) -> list[str]:
    listed = urllib.request.urlopen(f"http://127.0.0.1:{http_port}/get_all_keys", timeout=60).read().decode()
    return [key for key in listed.split("\n") if key.endswith(".kv")]


def spoil(port: str, http_port: str) -> None:
    store = client(port)
    for key in keys(http_port):
        content = bytearray(store.get(key))  # type: ignore[attr-defined]
        content[len(content) // 2] ^= 0x5A
        assert store.remove(key, True) == 0  # type: ignore[attr-defined]
        assert store.put(key, bytes(content)) == 0  # type: ignore[attr-defined]


def remove(port: str, http_port: str) -> None:
    store = client(port)
    for key in keys(http_port):
        assert store.remove(key, True) == 0  # type: ignore[attr-defined]


if __name__ == "__main__":
    {"master": master, "holder": holder, "spoil": spoil, "remove": remove}[sys.argv[1]](*sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)
