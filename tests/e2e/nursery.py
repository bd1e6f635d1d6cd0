"""Engines' processes without their imports, which take six of the eight seconds of a start.

`nursery.py FD` is an interpreter that has imported vLLM, and forks a process for each order that comes through the
socket FD. That is as if started afresh: with the order's program, environment, directory and log, in a session of its
own, and with its mark where others look for it, in /proc/PID/environ. Nothing of FlexKV is imported before.
What they share that processes started afresh do not is the seed of Python's hash(); the further processes of an engine,
which vLLM starts, have their own."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

MARK = "E2E_RUN_ID"
_ORDER_BYTES = 1 << 20
_IMPORT_SECONDS_MAX = 600.0  # else it hangs
_IMPORTS = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
)


class Child:
    """A process that the nursery has forked: what subprocess.Popen is to its own."""

    def __init__(self, told: socket.socket, args: list[str]) -> None:
        """`told`: by which the nursery says the process id, and later how it ended."""
        self.args = args
        self._told = told
        told.settimeout(_IMPORT_SECONDS_MAX)
        self.pid = int(self._next())
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        if self._code is None:
            self._told.settimeout(timeout)
            try:
                self._code = int(self._next())
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._told.close()
        return self._code

    def _next(self) -> bytes:
        message = self._told.recv(64)
        if not message:
            raise RuntimeError("the nursery is gone (tests/e2e/nursery.py); what it said stands above")
        return message


class Nursery:
    """From any thread, several at once. It ends with whoever made it."""

    def __init__(self, environment: dict[str, str]) -> None:
        """`environment`: with it vLLM is imported."""
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fd = theirs.fileno()
            argv = [sys.executable, "-P", __file__, str(fd)]
            # Its mark is what the children's marks are written over.
            environment = environment | {MARK: "0" * 32}
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, env=environment, pass_fds=[fd], start_new_session=True
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def start(self, program: Path, argument: str, environment: dict[str, str], directory: Path, log: Path) -> Child:
        """Runs `program argument` in the directory; what it says is appended to the log."""
        order = {
            "argv": [str(program), argument],
            "environment": environment,
            "directory": str(directory),
            "log": str(log),
        }
        told, tells = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with tells:
            socket.send_fds(self._orders, [json.dumps(order).encode()], [tells.fileno()])
        return Child(told, order["argv"])


def serve(orders: socket.socket) -> dict[str, Any] | None:
    """Forks for each order. Returns the order in the child, and None once there is nobody to order."""
    children: dict[int, tuple[int, socket.socket]] = {}  # by a descriptor that is readable when the child has ended
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready in children:
                pid, tells = children.pop(ready)
                poll.unregister(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with tells, contextlib.suppress(OSError):
                    tells.send(str(code).encode())
                continue
            order, fds, _, _ = socket.recv_fds(orders, _ORDER_BYTES, 1)
            if not order:
                return None
            tells = socket.socket(fileno=fds[0])
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                for descriptor, (_, other) in children.items():
                    os.close(descriptor)
                    other.close()
                tells.close()
                orders.close()
                return dict(json.loads(order))
            tells.send(str(pid).encode())
            descriptor = os.pidfd_open(pid)
            children[descriptor] = pid, tells
            poll.register(descriptor, select.POLLIN)


def become(order: dict[str, Any]) -> None:
    """In the child: all that a process has from whoever starts it."""
    os.setsid()
    os.chdir(order["directory"])
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    # /proc/PID/environ shows what the nursery was started with, where it lies; new variables lie elsewhere.
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    mark = order["environment"][MARK].encode()
    ctypes.memmove(libc.getenv(MARK.encode()), mark, len(mark))
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = order["argv"]


def main() -> None:
    orders = socket.socket(fileno=int(sys.argv[1]))
    for name in _IMPORTS:
        importlib.import_module(name)
    order = serve(orders)
    if order is not None:
        become(order)
        runpy.run_path(order["argv"][0], run_name="__main__")


if __name__ == "__main__":
    main()
