"""What the processes have in common: they end with the node, and talk with it in frames of fixed sizes."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator
from select import select

PACKAGE = "mooncake-transfer-engine-non-cuda"
TEXT_MAX = 255  # bytes

_NODE = 3  # the descriptor; what else the node gives follows
_PR_SET_PDEATHSIG = 1
_MAP_SHARED = 1
_PROT_READ = 1
_PROT_WRITE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)


class Node:
    """The connection to the node that started this process. Leaves the process by SystemExit once the node is gone."""

    def __init__(self) -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # even if this process hangs
        self._socket = socket.socket(fileno=_NODE)

    def frames(self, size: int, timeout: float | None) -> Iterator[bytes]:
        """Those that are there; waits for the first one (in seconds; None: for ever)."""
        while select([self._socket], [], [], timeout)[0]:
            frame = self._socket.recv(size + 1)
            if not frame:
                sys.exit(0)
            if len(frame) != size:
                sys.exit(f"the node sent a frame of {len(frame)} bytes; both are of one version of FlexKV?")
            yield frame
            timeout = 0

    def say(self, frame: bytes) -> None:
        """Waits while the node does not take it."""
        try:
            self._socket.sendall(frame)
        except ConnectionError:
            sys.exit(0)


def map_given(index: int, *, writable: bool) -> tuple[int, int]:
    """Address and size of the memory that the node gave as its descriptor number `index`."""
    fd = _NODE + 1 + index
    size = os.fstat(fd).st_size
    protection = _PROT_READ | (_PROT_WRITE if writable else 0)
    address = _libc.mmap(None, size, protection, _MAP_SHARED, fd, 0)
    if address in {None, ctypes.c_void_p(-1).value}:
        number = ctypes.get_errno()
        raise OSError(number, f"mapping {size} bytes of the node's memory: {os.strerror(number)}")
    return address, size


def text(words: str) -> bytes:
    """As much as a frame has room for."""
    return words.encode()[:TEXT_MAX]
