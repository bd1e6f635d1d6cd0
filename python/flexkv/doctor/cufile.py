"""NVIDIA's cuFile by ctypes: where its library may be, and reads of a file into GPU memory."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "libcufile.so.0"
_OPAQUE_FD = 1
_FIRST_ERROR = 5000  # cuFile's own codes are above it


class CuFileError(Exception):
    """One line that says which call failed and why."""


class _Error(ctypes.Structure):
    _fields_ = (("code", ctypes.c_int), ("cuda_code", ctypes.c_int))


class _Handle(ctypes.Union):
    _fields_ = (("descriptor", ctypes.c_int), ("pointer", ctypes.c_void_p))


class _Description(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("handle", _Handle), ("operations", ctypes.c_void_p))


def library_candidates() -> Iterator[str]:
    """From the wheel nvidia-cufile, then CUDA's own folder, then wherever the loader looks."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield from map(str, sorted(Path(folder).glob(f"*/lib/{NAME}"), reverse=True))  # the newest CUDA first
    for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if root and (path := Path(root, "lib64", NAME)).exists():
            yield str(path)
    yield NAME


def load_library() -> tuple[str, ctypes.CDLL]:
    """The first that loads. CuFileError if none does."""
    why = ""
    for path in library_candidates():
        try:
            return path, ctypes.CDLL(path)
        except OSError as error:
            why = why or str(error)
    raise CuFileError(f"{NAME} cannot be loaded ({why})")


def version_of(library: ctypes.CDLL) -> str:
    """Such as 1.15; empty where it is too old to tell."""
    value = ctypes.c_int()
    try:
        function = library.cuFileGetVersion
    except AttributeError:
        return ""
    function.restype = _Error
    return f"{value.value // 1000}.{value.value % 1000 // 10}" if function(ctypes.byref(value)).code == 0 else ""


class CuFile:
    """One file and one piece of device memory. read() by any thread with a current context."""

    def __init__(self, library: ctypes.CDLL, descriptor: int, memory: int, count: int) -> None:
        self._library = library
        self._memory = memory
        self._function("cuFileRead").restype = ctypes.c_ssize_t
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._call("cuFileDriverOpen")
            stack.callback(self._close_driver)
            description = _Description(_OPAQUE_FD, _Handle(descriptor=descriptor), None)
            self._file = ctypes.c_void_p()
            self._call("cuFileHandleRegister", ctypes.byref(self._file), ctypes.byref(description))
            stack.callback(library.cuFileHandleDeregister, self._file)
            self._call("cuFileBufRegister", ctypes.c_void_p(memory), ctypes.c_size_t(count), ctypes.c_int(0))
            # The memory may be freed only after this: else the kernel's part can hang.
            stack.callback(library.cuFileBufDeregister, ctypes.c_void_p(memory))
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()

    def read(self, count: int, file_offset: int, memory_offset: int) -> None:
        done = self._library.cuFileRead(
            self._file,
            ctypes.c_void_p(self._memory),
            ctypes.c_size_t(count),
            ctypes.c_int64(file_offset),
            ctypes.c_int64(memory_offset),
        )
        if done == count:
            return
        raise CuFileError(f"cuFileRead: {_text(-done) if done < 0 else f'{done} of {count} bytes'}")

    def _function(self, name: str) -> Any:
        try:
            return getattr(self._library, name)
        except AttributeError:
            raise CuFileError(f"{name}: this cuFile does not have it") from None

    def _call(self, name: str, *arguments: object) -> None:
        function = self._function(name)
        function.restype = _Error
        if (error := function(*arguments)).code != 0:
            raise CuFileError(f"{name}: {_text(error.code)}")

    def _close_driver(self) -> None:
        close = getattr(self._library, "cuFileDriverClose_v2", None) or self._library.cuFileDriverClose
        close.restype = _Error
        close()


def _text(code: int) -> str:
    """The library has no names for its own codes; it writes what was wrong to its log."""
    return f"error {abs(code)}" if abs(code) > _FIRST_ERROR else os.strerror(abs(code))
