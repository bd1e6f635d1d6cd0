"""The process in which a node runs Mooncake's Transfer Engine, with this test in the place of the node and of its peers."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from select import select
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("mooncake") is None, reason="scripts/setup --tests installs Mooncake")

_ORDER = struct.Struct("=6Q256s")
_ANSWER = struct.Struct("=3Q256s")
_READY, _ENDED, _ALIVE, _TROUBLE = range(1, 5)
_POOL_BYTES, _WORDS_BYTES, _LANDING_BYTES = 8 << 20, 4096, 4 << 20

# A peer that has the engine's name, and tries what it is not meant to do.
_PEER = """
import ctypes, os, sys
os.environ["MC_FORCE_TCP"] = "1"
from mooncake.engine import TransferEngine
engine = TransferEngine()
assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
mine = ctypes.create_string_buffer(b"overwritten", 4096)
name, address = sys.argv[1], int(sys.argv[2])
write = engine.transfer_sync_write(name, ctypes.addressof(mine), address, 4096)
read = engine.transfer_sync_read(name, ctypes.addressof(mine), address, 4096)
sys.stdout.buffer.write(bytes([write & 255, read & 255]) + mine.raw[:16])
sys.stdout.flush()
os._exit(0)
"""


@dataclass
class _Process:
    """With memory whose bytes are those of `os.pread(process.pool, ...)`."""

    module: str = "flexkv.mooncake.reader"
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = (_POOL_BYTES, _WORDS_BYTES, _LANDING_BYTES)
        self.pool, self.words, self.landing = memories = [os.memfd_create("test") for _ in sizes]
        for memory, size in zip(memories, sizes, strict=True):
            os.ftruncate(memory, size)
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(60)
        read_only = [os.open(f"/proc/self/fd/{memory}", os.O_RDONLY) for memory in (self.pool, self.words)]
        given = [os.dup(fd) for fd in (other.fileno(), *read_only, self.landing)]

        def place() -> None:
            for number, fd in enumerate(given):
                os.dup2(fd, 100 + number)
            for number in range(len(given)):
                os.dup2(100 + number, 3 + number)

        argv = [sys.executable, "-P", "-m", self.module, "127.0.0.1"]
        environment = os.environ | self.environment
        self.process = subprocess.Popen(argv, preexec_fn=place, close_fds=False, env=environment)  # noqa: PLW1509
        for fd in (*given, *read_only):
            os.close(fd)
        other.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()
        for memory in (self.pool, self.words, self.landing):
            os.close(memory)

    def hear(self) -> tuple[int, int, int, str]:
        while True:
            frame = self.socket.recv(1000)
            assert frame, "the process has ended"
            kind, first, second, text = _ANSWER.unpack(frame)
            if kind != _ALIVE:
                return kind, first, second, text.rstrip(b"\0").decode()

    def order(self, number: int, owner: str, address: int, word_address: int, size: int, offset: int = 0) -> None:
        self.socket.send(
            _ORDER.pack(number, address, word_address, offset, _LANDING_BYTES - 8, size, owner.encode())
        )


@pytest.fixture(autouse=True)
def same_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the processes; this one may have found its packages otherwise."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.fixture
def make() -> Iterator[Any]:
    made: list[_Process] = []

    def one(**given: Any) -> _Process:
        made.append(_Process(**given))
        return made[-1]

    yield one
    for process in made:
        process.close()


def test_it_reads_bytes_and_then_the_word(make: Any) -> None:
    owner, reader = make(), make()
    (kind, pool, words, name), (other_kind, _, _, _) = owner.hear(), reader.hear()
    assert kind == other_kind == _READY
    content = os.urandom(2 << 20)
    os.pwrite(owner.pool, content, 1 << 20)
    os.pwrite(owner.words, b"the word", 16)
    reader.order(7, name, pool + (1 << 20), words + 16, len(content))
    assert reader.hear()[:3] == (_ENDED, 7, 1)
    assert os.pread(reader.landing, len(content), 0) == content
    assert os.pread(reader.landing, 8, _LANDING_BYTES - 8) == b"the word"


def test_what_is_not_there_to_be_read_is_said_to_have_failed(make: Any) -> None:
    owner, reader = make(), make()
    (_, pool, words, name), _ = owner.hear(), reader.hear()
    reader.order(1, name, pool + _POOL_BYTES, words, 8)  # beyond the pool
    assert reader.hear()[:3] == (_ENDED, 1, 0)
    reader.order(2, name, pool, words + _WORDS_BYTES, 8)  # there is no such word
    assert reader.hear()[:3] == (_ENDED, 2, 0)
    reader.order(3, "127.0.0.1:1", pool, words, 8)  # nobody
    assert reader.hear()[:3] == (_ENDED, 3, 0)
    reader.order(4, name, pool, words, 8)
    assert reader.hear()[:3] == (_ENDED, 4, 1), "others are read all the same"


def test_peers_can_read_what_is_lent_and_write_nowhere(make: Any) -> None:
    owner = make()
    _, pool, words, name = owner.hear()
    os.pwrite(owner.pool, b"a block's bytes!", 0)
    os.pwrite(owner.words, b"word of a lease!", 0)
    landing = bytes(64)

    def tries(address: int) -> tuple[bool, bool, bytes]:
        said = subprocess.run([sys.executable, "-c", _PEER, name, str(address)], capture_output=True, check=True).stdout
        return said[-18] == 0, said[-17] == 0, said[-16:]

    assert tries(pool) == (False, True, b"a block's bytes!")
    assert tries(words) == (False, True, b"word of a lease!")
    maps = open(f"/proc/{owner.process.pid}/maps").read().splitlines()  # noqa: SIM115
    shared = [line.split() for line in maps if "memfd:test" in line]
    assert sorted(line[1] for line in shared) == ["r--s", "r--s", "rw-s"]
    where = next(int(line[0].split("-")[0], 16) for line in shared if line[1] == "rw-s")
    assert tries(where)[:2] == (False, False), "where reads land is nobody else's"
    assert os.pread(owner.landing, 64, 0) == landing
    assert os.pread(owner.pool, 16, 0) == b"a block's bytes!"


def test_it_ends_with_the_node(make: Any) -> None:
    process = make()
    process.hear()
    process.socket.close()
    assert process.process.wait(60) == 0


def test_an_order_of_another_size_ends_it(make: Any) -> None:
    process = make()
    process.hear()
    process.socket.send(bytes(_ORDER.size + 1))
    assert process.process.wait(60) == 1
    beyond = make()
    beyond.hear()
    beyond.order(1, "127.0.0.1:1", 0, 0, 8, offset=_LANDING_BYTES)
    assert beyond.process.wait(60) == 1


def test_it_is_killed_with_the_thread_that_started_it(make: Any) -> None:
    script = (
        "import os, signal, socket, subprocess, sys, time\n"
        "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "import flexkv.mooncake.process as p\n"
        "code = 'import flexkv.mooncake.process as p, time; n = p.Node(); n.say(b\"on\"); time.sleep(1000)'\n"
        "child = subprocess.Popen([sys.executable, '-c', code], preexec_fn=lambda: os.dup2(b.fileno(), 3), close_fds=False)\n"
        "a.recv(10)\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    assert said.returncode == -signal.SIGKILL
    pid = int(said.stdout)
    fd = None
    try:
        fd = os.pidfd_open(pid)
        assert select([fd], [], [], 60)[0], "it goes on"
    except ProcessLookupError:
        pass
    finally:
        if fd is not None:
            os.close(fd)


def test_without_mooncake_it_says_what_to_install(make: Any, tmp_path: Any) -> None:
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").write_text("")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    kind, _, _, said = make(environment={"PYTHONPATH": path}).hear()
    assert kind == _TROUBLE
    assert "pip install mooncake-transfer-engine-non-cuda" in said
