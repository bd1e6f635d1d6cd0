"""Objects of a node in a Mooncake Store.

    python -m flexkv.mooncake.store HOST:PORT HTTP

HOST:PORT is Mooncake's master, HTTP where the same answers over HTTP. The node starts it
(src/flexkv/remote/mooncake_process.cc, which decides everything) and orders puts, gets and lists; bytes are in memory
that the two share. Lends the store no memory. Calls of Mooncake's wait for as long as they like, so each order has a
thread; the first one of the process only listens and gives signs of life.
"""

from __future__ import annotations

import bisect
import ctypes
import http.client
import os
import queue
import socket
import struct
import sys
import threading
import time
import urllib.request
from typing import Any

from flexkv.mooncake.process import PACKAGE, TEXT_MAX, Node, map_given, text

_ORDER = struct.Struct(f"=5Q{TEXT_MAX + 1}s")
_ANSWER = struct.Struct(f"=5Q{TEXT_MAX + 1}s")
_PUT, _GET, _LIST = range(1, 4)
_READY, _ENDED, _ALIVE, _TROUBLE = range(1, 5)
_DONE, _MISSING, _SHORT, _FAILED = range(4)
_THREADS = 8  # as many orders as the node has under way
_SIGN_EVERY = 1.0  # seconds
_CONNECT_SECONDS = 5.0
_HTTP_SECONDS = 10.0
_NAMES_AT_ONCE = 4096

# Of Mooncake's
_NO_ROOM = -200
_WRONG_RANGE = -600
_NO_OBJECT = -704


class _Store:
    def __init__(self, node: Node, master: str, http: str) -> None:
        # Whatever cards there are: RDMA was never tried.
        os.environ["MC_FORCE_TCP"] = "1"
        os.environ.setdefault("MC_TCP_STATUS_TIMEOUT_SEC", "5")
        os.environ.setdefault("MC_TCP_PROGRESS_TIMEOUT_SEC", "5")
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        address = _own_address(master)
        from mooncake.store import MooncakeDistributedStore

        self._node = node
        self._http = http
        self._store: Any = MooncakeDistributedStore()
        code = self._store.setup(address, "P2PHANDSHAKE", 0, 0, "tcp", "", master)
        if code != 0:
            raise OSError(f"Mooncake's client does not start with the master at {master}: error {code}")
        self._memory, self._size = map_given(0, writable=True)
        code = self._store.register_buffer(self._memory, self._size)
        if code != 0:
            raise OSError(f"Mooncake's client does not take {self._size} bytes of memory: error {code}")
        self._orders: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._under_way = 0  # guarded by the lock
        self._names: tuple[bytes, list[bytes]] = b"", []  # of the folder that was listed last; guarded by the lock
        # Local: a proxy of the environment's is for the way out.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(_THREADS):
            threading.Thread(target=self._work, daemon=True).start()
        self._say(_READY)

    def run(self) -> None:
        sign_at = 0.0
        while True:
            with self._lock:
                busy = self._under_way > 0
            for frame in self._node.frames(_ORDER.size, _SIGN_EVERY if busy else None):
                order = _ORDER.unpack(frame)
                if order[2] + order[3] > self._size:
                    sys.exit("the node ordered something where there is no memory")
                with self._lock:
                    self._under_way += 1
                self._orders.put(order)
            if busy and time.monotonic() >= sign_at:
                self._say(_ALIVE)
                sign_at = time.monotonic() + _SIGN_EVERY

    def _work(self) -> None:
        while True:
            order, kind, offset, size, argument, name = self._orders.get()
            how, why, listed, more = _FAILED, "", 0, 0
            try:
                key = name.rstrip(b"\0").decode()
                if kind == _PUT:
                    how, why = self._put(key, self._memory + offset, size, replace=argument == 1)
                elif kind == _GET:
                    how, why = self._get(key, self._memory + offset, size, argument)
                else:
                    listed, more = self._list(key.encode(), argument, self._memory + offset, size)
                    how = _DONE
            except Exception as error:  # noqa: BLE001 - whatever it was, the node is told that it failed
                why = str(error) or type(error).__name__
            with self._lock:
                self._under_way -= 1
            self._say(_ENDED, order, how, listed, more, why)

    def _put(self, key: str, address: int, size: int, *, replace: bool) -> tuple[int, str]:
        if replace:
            # Mooncake keeps what is there, and says that it is well.
            code = self._store.remove(key, force=True)
            if code not in {0, _NO_OBJECT}:
                return _FAILED, f"Mooncake does not remove a damaged object: error {code}"
        code = self._store.put_from(key, address, size)
        if code == 0:
            return _DONE, ""
        if code == _NO_ROOM:
            return _FAILED, "Mooncake has no room (error -200): nobody lends it memory, or all of that is in use"
        return _FAILED, f"Mooncake does not take an object: error {code}"

    def _get(self, key: str, address: int, size: int, offset: int) -> tuple[int, str]:
        [[[code]]] = self._store.get_into_ranges([address], [[key]], [[[0]]], [[[offset]]], [[[size]]])
        if code == size:
            return _DONE, ""
        if code == _NO_OBJECT:
            return _MISSING, ""
        if code == _WRONG_RANGE and 0 <= self._store.get_size(key) < offset + size:
            return _SHORT, ""
        return _FAILED, f"Mooncake does not bring an object: error {code}"

    def _list(self, latest: bytes, folder_bytes: int, address: int, room: int) -> tuple[int, int]:
        """How many bytes of names were put there, and whether there are more. `latest` begins with the folder."""
        folder = latest[:folder_bytes]
        with self._lock:
            listed, names = self._names
        if latest == folder or listed != folder:
            names = self._fetch(folder)
            with self._lock:
                self._names = folder, names
        first = bisect.bisect_right(names, latest)
        page: list[bytes] = []
        used = 0
        for name in names[first : first + _NAMES_AT_ONCE]:
            if used + len(name) + 1 > room:
                break
            used += len(name) + 1
            page.append(name)
        found = b"".join(name + b"\n" for name in page)
        ctypes.memmove(address, found, len(found))
        return len(found), int(first + len(page) < len(names))

    def _fetch(self, folder: bytes) -> list[bytes]:
        url = self._http.rstrip("/") + "/get_all_keys"
        try:
            with self._opener.open(url, timeout=_HTTP_SECONDS) as answer:
                names = answer.read().split(b"\n")  # line by line, one that was cut short would look like a whole one
        except http.client.IncompleteRead as error:
            raise OSError(f"Mooncake's master was cut off while it listed at {url}") from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise OSError(f"Mooncake's master does not list at {url}: {reason}") from error
        found = (name.rstrip(b"\r") for name in names)
        return sorted(name for name in found if name.startswith(folder) and len(name) <= TEXT_MAX)

    def _say(self, kind: int, order: int = 0, how: int = 0, listed: int = 0, more: int = 0, why: str = "") -> None:
        self._node.say(_ANSWER.pack(kind, order, how, listed, more, text(why)))


def _own_address(master: str) -> str:
    """By which this machine reaches the master. Without one Mooncake's client would try for more than a minute."""
    host, _, port = master.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise OSError(f"no Mooncake master answers at {master}: {error}") from error


def main() -> None:
    node = Node()
    try:
        store = _Store(node, *sys.argv[1:3])
    except ImportError as error:
        trouble = f"Mooncake cannot be used: {error} (tested with: pip install {PACKAGE}==0.3.13.post1)"
    except OSError as error:
        trouble = str(error)
    else:
        store.run()
    node.say(_ANSWER.pack(_TROUBLE, 0, 0, 0, 0, text(trouble)))


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
        # Threads that hang in Mooncake are waited for otherwise, and what they use is taken from under them.
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
