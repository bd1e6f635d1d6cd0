"""One connection to Redis for the few commands of a check. What nodes use is the core's."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from typing import Any

_LINE_MAX = 64 << 10
_REPLY_MAX = 16 << 20


class RedisError(Exception):
    """One line that says what went wrong, without the password."""


class RedisRefusal(RedisError):
    """An error that Redis itself reports."""


class RedisClient:
    """Not thread-safe. Each call ends by the deadline, one of time.monotonic(); a resolver that hangs does not."""

    def __init__(self, host: str, port: int, password: str, deadline: float) -> None:
        """Connects and gives the password. Raises RedisError."""
        self._password = password
        self._deadline = deadline
        self._buffer = b""
        try:
            self._socket = _connect(host, port, self._left())
        except OSError as error:
            raise RedisError(f"cannot connect: {error.strerror or error}") from None
        try:
            if password:
                self.call("AUTH", password)
            self.call("PING")
        except RedisRefusal:
            self.close()
            raise
        except RedisError:
            self.close()
            if speaks_tls(host, port, self._left()):
                raise RedisError("it speaks TLS only") from None
            raise

    def close(self) -> None:
        self._socket.close()

    def call(self, *words: str) -> Any:
        """Bytes, a number, a list or None. Raises RedisError, RedisRefusal."""
        out = f"*{len(words)}\r\n".encode()
        for word in map(str.encode, words):
            out += b"$%d\r\n%s\r\n" % (len(word), word)
        try:
            self._socket.settimeout(self._left())
            self._socket.sendall(out)
            return self._reply()
        except TimeoutError:
            raise RedisError("no answer in time") from None
        except OSError as error:
            raise RedisError(error.strerror or str(error)) from None

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    def _reply(self) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            text = rest.decode(errors="replace")
            raise RedisRefusal(text.replace(self._password, "***") if self._password else text)
        if kind == b"+":
            return rest
        try:
            number = int(rest)
        except ValueError:
            raise RedisError("not the language of Redis") from None
        if kind == b":":
            return number
        if kind == b"$" and -1 <= number <= _REPLY_MAX:
            return None if number < 0 else self._take(number + 2)[:-2]
        if kind == b"*" and -1 <= number <= _REPLY_MAX:
            return None if number < 0 else [self._reply() for _ in range(number)]
        raise RedisError("not the language of Redis")

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > _LINE_MAX:
                raise RedisError("not the language of Redis")
            self._fill()
        line = self._take(end + 2)
        return line[:-2]

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill()
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _fill(self) -> None:
        self._socket.settimeout(self._left())
        got = self._socket.recv(64 << 10)
        if not got:
            raise RedisError("it closed the connection")
        self._buffer += got


def _connect(host: str, port: int, seconds: float) -> socket.socket:
    if not host.startswith("/"):
        made = socket.create_connection((host, port), seconds)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made
    made = socket.socket(socket.AF_UNIX)
    try:
        made.settimeout(seconds)
        made.connect(host)
    except OSError:
        made.close()
        raise
    return made


def speaks_tls(host: str, port: int, seconds: float) -> bool:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # it is only asked whether it does
    with contextlib.suppress(OSError, ValueError), _connect(host, port, seconds) as plain:
        try:
            context.wrap_socket(plain).close()
        except ssl.SSLError as error:
            # It wants a certificate of ours: then it is TLS, too.
            return "CERTIFICATE_REQUIRED" in str(error) or "HANDSHAKE_FAILURE" in str(error)
        return True
    return False
