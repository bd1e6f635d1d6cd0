"""A drive that hangs and disappears: a FUSE file system that shows a directory, in a process of its own.

    python -m soak.drive DIRECTORY MOUNT_POINT

Says "ready" once it is mounted. Then each line on its standard input is a fault that begins and, so that nobody has to be
alive to end it, the seconds after which it ends: "hang 5" (nothing is answered), "fail 5" (all is answered with EIO).
Ends with its input. It speaks the kernel's protocol (linux/fuse.h) itself, one request after the other.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import sys
import time
from collections.abc import Callable

_HEADER = struct.Struct("<IIQQIIIHH")
_ANSWER = struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<4Q2I")
_OPEN = struct.Struct("<QII")
_WRITE_MAX = 1 << 20
_ROOT = 1
_DIRECT_IO = 1  # FOPEN_DIRECT_IO: no page cache above this one
_INIT_FLAGS = 1 << 0 | 1 << 5 | 1 << 15 | 1 << 22  # async reads, big writes, async direct I/O, max_pages
_SILENT = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET: no answer is expected
_FALLOCATE, _INIT = 43, 26


def mount(point: str) -> int:
    """The file of the kernel's requests."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"soak-drive", point.encode(), b"fuse", 2 | 4, options) != 0:  # MS_NOSUID | MS_NODEV
        raise OSError(ctypes.get_errno(), f"cannot mount {point}")
    return fd


class Drive:
    def __init__(self, directory: str, fd: int) -> None:
        self._fd = fd
        self._paths = {_ROOT: directory}
        self._nodes = {directory: _ROOT}
        self._fault = ""
        self._until = 0.0
        self._held: list[bytes] = []
        self._calls: dict[int, Callable[[int, bytes], bytes]] = {
            1: self._lookup,
            3: lambda node, data: self._attributes(os.lstat(self._paths[node])),
            4: self._set_attributes,
            10: lambda node, data: self._done(os.unlink(self._child(node, data))),
            12: lambda node, data: self._rename(node, data, 8),
            14: lambda node, data: _OPEN.pack(
                os.open(self._paths[node], struct.unpack_from("<I", data)[0] & os.O_ACCMODE), _DIRECT_IO, 0
            ),
            15: lambda node, data: (lambda fh, at, size: os.pread(fh, size, at))(*struct.unpack_from("<QQI", data)),
            16: self._write,
            17: self._file_system,
            18: lambda node, data: self._done(os.close(struct.unpack_from("<Q", data)[0])),
            20: lambda node, data: self._done(os.fsync(struct.unpack_from("<Q", data)[0])),
            25: lambda node, data: b"",  # flush
            27: lambda node, data: _OPEN.pack(0, 0, 0),
            28: self._list,
            29: lambda node, data: b"",
            30: lambda node, data: b"",
            35: self._create,
            _FALLOCATE: self._reserve,
            45: lambda node, data: self._rename(node, data, 16),
        }

    def run(self) -> None:
        while True:
            left = max(0.0, self._until - time.monotonic()) if self._fault else None
            ready, _, _ = select.select([self._fd, sys.stdin], [], [], left)
            if self._fault and time.monotonic() >= self._until:
                self._fault = ""
                for request in self._held:
                    self._serve(request)
                self._held.clear()
            if sys.stdin in ready:
                line = sys.stdin.buffer.raw.readline().split()  # type: ignore[attr-defined]
                if not line:
                    return
                self._fault, self._until = line[0].decode(), time.monotonic() + float(line[1])
            if self._fd in ready:
                try:
                    request = os.read(self._fd, _WRITE_MAX + 4096)
                except OSError as error:
                    if error.errno == errno.ENODEV:  # it is unmounted
                        return
                    if error.errno in (errno.ENOENT, errno.EAGAIN, errno.EINTR):  # who asked has been killed meanwhile
                        continue
                    raise
                if self._fault == "hang" and _HEADER.unpack_from(request)[1] not in _SILENT:
                    self._held.append(request)
                else:
                    self._serve(request)

    def _serve(self, request: bytes) -> None:
        _, operation, unique, node, *_ = _HEADER.unpack_from(request)
        if operation in _SILENT:
            return
        data = request[_HEADER.size :]
        status, answer = 0, b""
        try:
            if operation == _INIT:
                answer = struct.pack("<4I2H2I2H8I", 7, 31, 1 << 20, _INIT_FLAGS, 64, 48, _WRITE_MAX, 1, 256, *[0] * 9)
            elif self._fault == "fail":
                status = -errno.EIO
            elif operation in self._calls:
                answer = self._calls[operation](node, data)
            else:
                status = -errno.ENOSYS
        except OSError as error:
            status = -(error.errno or errno.EIO)
        try:
            os.write(self._fd, _ANSWER.pack(_ANSWER.size + len(answer), status, unique) + answer)
        except OSError as error:
            if error.errno != errno.ENOENT:  # who asked has been killed
                raise

    @staticmethod
    def _done(_: object) -> bytes:
        return b""

    def _child(self, node: int, name: bytes) -> str:
        return os.path.join(self._paths[node], name.split(b"\0", 1)[0].decode())

    def _node(self, path: str) -> int:
        if path not in self._nodes:
            self._nodes[path] = len(self._paths) + 1
            self._paths[self._nodes[path]] = path
        return self._nodes[path]

    def _packed(self, of: os.stat_result) -> bytes:
        times = (of.st_atime_ns, of.st_mtime_ns, of.st_ctime_ns)
        seconds, rest = [t // 10**9 for t in times], [t % 10**9 for t in times]
        return _ATTRIBUTES.pack(
            of.st_ino, of.st_size, of.st_blocks, *seconds, *rest, of.st_mode, of.st_nlink, of.st_uid, of.st_gid, 0, 4096, 0
        )

    def _attributes(self, of: os.stat_result) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + self._packed(of)

    def _entry(self, path: str) -> bytes:
        return _ENTRY.pack(self._node(path), 0, 0, 0, 0, 0) + self._packed(os.lstat(path))

    def _lookup(self, node: int, data: bytes) -> bytes:
        return self._entry(self._child(node, data))

    def _set_attributes(self, node: int, data: bytes) -> bytes:
        valid, _, fh, size = struct.unpack_from("<IIQQ", data)
        path = self._paths[node]
        target = fh if valid & 1 << 6 else path
        if valid & 1 << 3:
            os.truncate(target, size)
        if valid & 1:
            os.chmod(path, struct.unpack_from("<I", data, 68)[0] & 0o7777)
        return self._attributes(os.stat(target))

    def _rename(self, node: int, data: bytes, skip: int) -> bytes:
        to = struct.unpack_from("<Q", data)[0]
        old, new, *_ = data[skip:].split(b"\0")
        source, target = self._child(node, old), self._child(to, new)
        os.rename(source, target)
        # The name's node goes with it; of what it replaced, the node is found no more.
        number = self._node(source)
        del self._nodes[source]
        self._nodes[target] = number
        self._paths[number] = target
        return b""

    def _write(self, node: int, data: bytes) -> bytes:
        fh, at, size = struct.unpack_from("<QQI", data)
        return struct.pack("<II", os.pwrite(fh, memoryview(data)[40 : 40 + size], at), 0)

    def _create(self, node: int, data: bytes) -> bytes:
        flags, mode = struct.unpack_from("<II", data)
        path = self._child(node, data[16:])
        fh = os.open(path, flags & (os.O_ACCMODE | os.O_EXCL | os.O_TRUNC) | os.O_CREAT, mode & 0o7777)
        return self._entry(path) + _OPEN.pack(fh, _DIRECT_IO, 0)

    def _reserve(self, node: int, data: bytes) -> bytes:
        fh, at, size, mode = struct.unpack_from("<QQQI", data)
        if mode != 0:
            raise OSError(errno.EOPNOTSUPP, "only to reserve")
        os.posix_fallocate(fh, at, size)
        return b""

    def _list(self, node: int, data: bytes) -> bytes:
        at, size = struct.unpack_from("<QI", data, 8)
        out = b""
        names = [".", "..", *sorted(os.listdir(self._paths[node]))]
        for number, name in enumerate(names[at:], at + 1):
            coded = name.encode()
            one = struct.pack("<QQII", number, number, len(coded), 0) + coded
            one += bytes(-len(one) % 8)
            if len(out) + len(one) > size:
                break
            out += one
        return out

    def _file_system(self, node: int, data: bytes) -> bytes:
        of = os.statvfs(self._paths[_ROOT])
        return struct.pack(
            "<5Q10I", of.f_blocks, of.f_bfree, of.f_bavail, of.f_files, of.f_ffree, of.f_bsize, 255, of.f_frsize, *[0] * 7
        )


def main() -> None:
    directory, point = sys.argv[1:]
    drive = Drive(directory, mount(point))
    print("ready", flush=True)
    drive.run()


if __name__ == "__main__":
    main()
