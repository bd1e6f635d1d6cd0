"""The few calls of the CUDA driver that measuring needs, by ctypes: no torch or CUDA toolkit has to be there."""

from __future__ import annotations

import ctypes

LIBRARY = "libcuda.so.1"
_PORTABLE = 1  # pinned memory for all contexts
_NON_BLOCKING = 1  # a stream that does not wait for the default one


class CudaError(Exception):
    """One line that says which call failed and why."""


class CudaDriver:
    """The first GPU's primary context. Any thread, after use_in_this_thread(). What is taken goes with the process."""

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise CudaError(f"the CUDA driver cannot be loaded: {error}") from None
        self._call("cuInit", ctypes.c_uint(0))
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        name = ctypes.create_string_buffer(96)
        self._call("cuDeviceGetName", name, ctypes.c_int(len(name)), device)
        self.device_name = name.value.decode(errors="replace")
        self.use_in_this_thread()

    def use_in_this_thread(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def device_memory(self, count: int) -> int:
        """Its address."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(count))
        return address.value

    def pinned_memory(self, count: int) -> int:
        """Its address, on the host."""
        address = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(count), ctypes.c_uint(_PORTABLE))
        return address.value or 0

    def stream(self) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(made), ctypes.c_uint(_NON_BLOCKING))
        return made

    def copy_to_device(self, to: int, source: int, count: int, stream: ctypes.c_void_p) -> None:
        """Returns when it has arrived."""
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(to), ctypes.c_void_p(source), ctypes.c_size_t(count), stream)
        self._call("cuStreamSynchronize", stream)

    def read_device(self, source: int, count: int) -> bytes:
        buffer = ctypes.create_string_buffer(count)
        self._call("cuMemcpyDtoH_v2", buffer, ctypes.c_uint64(source), ctypes.c_size_t(count))
        return buffer.raw

    def _call(self, name: str, *arguments: object) -> None:
        try:
            function = getattr(self._cuda, name)
        except AttributeError:
            raise CudaError(f"{name}: the driver does not have it") from None
        if (code := function(*arguments)) != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode(errors='replace')} ({code})")
