"""What `flexkv doctor --cluster` says of Redis servers that cannot be the directory, and of what is no Redis."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flexkv._core")

from cluster_doctor import doctor, free_port, make_secret, redis_server  # noqa: E402
from flexkv.config import load  # noqa: E402
from flexkv.doctor import cluster  # noqa: E402
from flexkv.doctor.redis_server import clock, memory, password, persistence, version  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("clean_environment"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
]


@pytest.fixture(autouse=True)
def _in_a_cluster(clean_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_ENABLE_P2P_CPU", "1")
    monkeypatch.setenv("FLEXKV_CLUSTER_SECRET_FILE", str(make_secret(tmp_path / "secret")))


def redis_check(port: int, monkeypatch: pytest.MonkeyPatch, *hidden: str) -> dict[str, Any]:
    monkeypatch.setenv("FLEXKV_REDIS_PORT", str(port))
    check = doctor(1, *hidden)[f"Redis at 127.0.0.1:{port}"]
    assert check["verdict"] == "wrong"
    return check


@pytest.mark.parametrize(
    ("has", "given", "advice"),
    [
        ("right-one", "", "it wants a password: set redis_password"),
        ("right-one", "wrong-one", "set redis_password to its password"),
        ("", "wrong-one", "or to none if it has none"),
    ],
)
def test_passwords(has: str, given: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_REDIS_PASSWORD", given)
    with redis_server(tmp_path, *(["--requirepass", has] if has else [])) as port:
        assert advice in redis_check(port, monkeypatch, "right-one", "wrong-one")["advice"]


def test_a_password_that_somebody_repeats_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_REDIS_PASSWORD", "mine")
    with answering(b"-ERR unknown command 'AUTH', with args beginning with: 'mine'\r\n") as port:
        assert redis_check(port, monkeypatch, "mine")["found"].endswith("with: '***'")


def test_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redis_check(free_port(), monkeypatch)["found"] == "cannot connect: Connection refused"


def test_tls_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    new = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=redis"]
    subprocess.run([*new, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    port = free_port()
    tls = {"tls-port": port, "port": 0, "tls-cert-file": certificate, "tls-key-file": key, "tls-auth-clients": "no"}
    options = [
        word for name, value in (tls | {"tls-ca-cert-file": certificate}).items() for word in (f"--{name}", str(value))
    ]
    with redis_server(tmp_path, *options, port=port):
        check = redis_check(port, monkeypatch)
    assert check["found"] == "it speaks TLS only"
    assert "tunnel" in check["advice"]


def test_what_never_answers_and_what_is_no_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_SECONDS", 1.0)
    with answering(b"") as port:
        assert redis_check(port, monkeypatch)["found"] == "no answer in time"
    for words in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$x\r\n", b"*99999999999\r\n"):
        with answering(words) as port:
            assert redis_check(port, monkeypatch)["found"] == "not the language of Redis"
    with answering(b"+PONG\r\n" * 22) as port:  # to whatever it is asked
        redis_check(port, monkeypatch)


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "noeviction"])
def test_memory_that_evicts(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with redis_server(tmp_path, "--maxmemory", "100mb", "--maxmemory-policy", policy) as port:
        monkeypatch.setenv("FLEXKV_REDIS_PORT", str(port))
        check = doctor(int(policy != "noeviction"))["memory of Redis"]
    assert policy in check["found"]
    assert check["advice"].startswith("" if policy == "noeviction" else "CONFIG SET maxmemory-policy noeviction")


def test_servers_that_take_no_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with redis_server(tmp_path, "--replicaof", "127.0.0.1 1", "--replica-serve-stale-data", "yes") as port:
        monkeypatch.setenv("FLEXKV_REDIS_PORT", str(port))
        assert "primary" in doctor(1)["writes to Redis"]["advice"]
    with redis_server(tmp_path) as port:
        rights = ["-@all", "+@read", "+@connection", "+info", "+time"]
        subprocess.run(["redis-cli", "-p", str(port), "ACL", "SETUSER", "default", *rights], check=True)
        monkeypatch.setenv("FLEXKV_REDIS_PORT", str(port))
        assert "ACL" in doctor(1)["writes to Redis"]["advice"]


def test_what_a_server_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load()
    assert version(settings, {"redis_version": "4.0.14"}, 0).advice == "it has no streams: Redis 5.0 or later"
    assert version(settings, {"redis_version": "5.0.1"}, 0.001).advice == ""
    assert version(settings, {}, 0.2).advice.startswith("one that is nearer")
    nearly = {"used_memory": "95", "maxmemory": "100", "maxmemory_policy": "noeviction"}
    assert memory(nearly).found.endswith("nearly full")
    assert memory({}).advice == ""
    assert persistence({"aof_enabled": "0"}).advice.startswith("CONFIG SET appendonly yes")
    assert persistence({"aof_enabled": "1"}).advice == persistence({}).advice == ""
    monkeypatch.setenv("FLEXKV_REDIS_HOST", "10.0.0.1")
    assert "reset the cluster" in password(load()).found


class _Elsewhere:
    """Stands for a Redis on a machine whose clock is another one: here both have the same."""

    def __init__(self, ahead: float) -> None:
        self._ahead = ahead

    def call(self, *_: str) -> list[bytes]:
        now = time.time() + self._ahead
        return [b"%d" % int(now), b"%d" % int(now % 1 * 1e6)]


@pytest.mark.parametrize(("ahead", "found"), [(90.0, "90.0"), (-90.0, "behind"), (0.2, "")])
def test_clocks(ahead: float, found: str) -> None:
    check = clock(_Elsewhere(ahead))  # type: ignore[arg-type]
    assert found in check.found
    assert bool(check.advice) == (abs(ahead) > 1)


class answering:
    """A server that says one thing to everybody, and keeps the connection."""

    def __init__(self, words: bytes) -> None:
        self._words = words
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []

    def __enter__(self) -> int:
        threading.Thread(target=self._serve, daemon=True).start()
        return self._listener.getsockname()[1]

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._connections:
            one.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            connection.sendall(self._words)
