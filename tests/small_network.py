"""Machines of a small network on this one: each a network namespace with one interface, and a wire between them whose
packets a test can lose, delay and cut off.

The wire is a thread that carries packets from one TUN device to another: the kernel's own way to do that, netem, is
missing in many kernels. Needs root and /dev/net/tun. Namespaces are not named anywhere, so none is left behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC_PRIVATE = 0x44000
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C
_UP = 0x1
_PACKET_BYTES_MAX = 65536
# Of the header of IPv4.
_SOURCE, _TARGET = slice(12, 16), slice(16, 20)


@dataclass(frozen=True)
class Weather:
    """What befalls each packet, in both directions. `jitter_s`: on top of the delay, at random, so that packets overtake
    others."""

    loss: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0


CUT = Weather(loss=1.0)


class Host:
    """A namespace of its own. Processes started here see nothing of the network but this machine and the wire, in /sys,
    too, where libraries look for interfaces."""

    def __init__(self, address: str) -> None:
        """OSError: not permitted, or no /dev/net/tun."""
        self.address = address
        self._thread = concurrent.futures.ThreadPoolExecutor(1)  # the one thread that is in the namespace
        try:
            self.wire = self._thread.submit(self._enter).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def _enter(self) -> int:
        libc = ctypes.CDLL(None, use_errno=True)

        def call(name: str, *arguments: object) -> None:
            if getattr(libc, name)(*arguments):
                error = ctypes.get_errno()
                raise OSError(error, f"{name}: {os.strerror(error)}")

        call("unshare", _CLONE_NEWNET | _CLONE_NEWNS)
        call("mount", b"none", b"/", None, _MS_REC_PRIVATE, None)
        call("mount", b"sysfs", b"/sys", b"sysfs", 0, None)
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"wire", _TUN_WITHOUT_HEADER))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                for order, address in ((_SIOCSIFADDR, self.address), (_SIOCSIFNETMASK, "255.255.255.0")):
                    packed = struct.pack("16sHH4s16x", b"wire", socket.AF_INET, 0, socket.inet_aton(address))
                    fcntl.ioctl(control, order, packed)
                for interface in (b"lo", b"wire"):
                    fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", interface, _UP))
        except BaseException:
            os.close(tun)
            raise
        return tun

    def start(self, argv: list[str], log: Path, **more: Any) -> subprocess.Popen[bytes]:
        """A process on this machine; what it says is appended to the log."""
        with log.open("ab") as output:
            return self._thread.submit(subprocess.Popen, argv, stdout=output, stderr=output, **more).result()

    def close(self) -> None:
        self._thread.shutdown()
        os.close(self.wire)


class Network:
    """Hosts and the wire between them."""

    def __init__(self, *names: str) -> None:
        """Hosts of these names. OSError: see Host."""
        self._random = random.Random(1)
        self._weather: dict[frozenset[bytes], Weather] = {}
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self.hosts: dict[str, Host] = {}
        try:
            for number, name in enumerate(names, start=1):
                self.hosts[name] = Host(f"10.77.0.{number}")
        except OSError:
            self._close_hosts()
            raise
        self._thread = threading.Thread(target=self._carry, name="wire", daemon=True)
        self._thread.start()

    def between(self, one: str, other: str, weather: Weather) -> None:
        """From now on, until told otherwise. Packets under way are not touched."""
        pair = frozenset(socket.inet_aton(self.hosts[name].address) for name in (one, other))
        self._weather[pair] = weather

    def heal(self) -> None:
        self._weather.clear()

    def close(self) -> None:
        os.eventfd_write(self._end, 1)
        self._thread.join()
        self._close_hosts()

    def _close_hosts(self) -> None:
        for host in self.hosts.values():
            host.close()
        os.close(self._end)

    def _carry(self) -> None:
        wires = {socket.inet_aton(host.address): host.wire for host in self.hosts.values()}
        under_way: list[tuple[float, int, bytes]] = []  # by the time when they arrive
        order = itertools.count()
        poll = select.epoll()
        for descriptor in (self._end, *wires.values()):
            poll.register(descriptor, select.EPOLLIN)
        with poll:
            while True:
                wait = max(under_way[0][0] - time.monotonic(), 0) if under_way else None
                for ready, _ in poll.poll(wait):
                    if ready == self._end:
                        return
                    packet = os.read(ready, _PACKET_BYTES_MAX)
                    weather = self._weather.get(frozenset((packet[_SOURCE], packet[_TARGET])), Weather())
                    if self._random.random() >= weather.loss:
                        arrives = time.monotonic() + weather.delay_s + self._random.random() * weather.jitter_s
                        heapq.heappush(under_way, (arrives, next(order), packet))
                while under_way and under_way[0][0] <= time.monotonic():
                    packet = heapq.heappop(under_way)[2]
                    # Not for one of us (a broadcast), or the interface is full: lost, as on any wire.
                    with contextlib.suppress(KeyError, OSError):
                        os.write(wires[packet[_TARGET]], packet)
