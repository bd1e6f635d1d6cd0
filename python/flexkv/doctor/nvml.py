"""What the NVIDIA driver says of its GPUs, through its management library: no context is made, no GPU woken for it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "libnvidia-ml.so.1"
_TEXT_BYTES = 96


class NvmlError(Exception):
    """One line that says which call failed and why."""


@dataclass(frozen=True)
class Link:
    """A PCIe link. Generations fall while a GPU rests."""

    generation: int
    width: int


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    pci_address: str  # 0000:3b:00.0
    link: Link | None  # None: the driver does not tell
    link_most: Link | None


@dataclass(frozen=True)
class Driver:
    version: str
    cuda: str  # the newest CUDA that it runs: 13.0
    gpus: tuple[Gpu, ...]


class _PciInfo(ctypes.Structure):
    _fields_ = (
        ("short_address", ctypes.c_char * 16),
        ("numbers", ctypes.c_uint * 5),
        ("address", ctypes.c_char * 32),
    )


def driver_is_there(root: Path = Path("/")) -> bool:
    """Whether the kernel part is loaded, whatever else is missing."""
    return (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidiactl").exists()


def read_driver(library: str = LIBRARY) -> Driver:
    """Raises NvmlError; OSError where the library is missing."""
    with _initialised(ctypes.CDLL(library)) as nvml:
        cuda = ctypes.c_int()
        _call(nvml, "nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(cuda))
        count = ctypes.c_uint()
        _call(nvml, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        return Driver(
            _text(nvml, "nvmlSystemGetDriverVersion"),
            f"{cuda.value // 1000}.{cuda.value % 1000 // 10}",
            tuple(_gpu(nvml, index) for index in range(count.value)),
        )


@contextmanager
def _initialised(nvml: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    _call(nvml, "nvmlInit_v2")
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: ctypes.CDLL, index: int) -> Gpu:
    device = ctypes.c_void_p()
    _call(nvml, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
    pci = _PciInfo()
    _call(nvml, "nvmlDeviceGetPciInfo_v3", device, ctypes.byref(pci))
    domain, _, rest = pci.address.decode(errors="replace").lower().partition(":")
    return Gpu(
        index,
        _text(nvml, "nvmlDeviceGetName", device),
        f"{domain[-4:]}:{rest}",  # as the kernel writes it: its domains have four digits
        _link(nvml, device, "Curr"),
        _link(nvml, device, "Max"),
    )


def _link(nvml: ctypes.CDLL, device: ctypes.c_void_p, which: str) -> Link | None:
    values = []
    for what in ("Generation", "Width"):
        value = ctypes.c_uint()
        try:
            _call(nvml, f"nvmlDeviceGet{which}PcieLink{what}", device, ctypes.byref(value))
        except NvmlError:
            return None  # virtual machines often hide it
        values.append(value.value)
    return Link(*values)


def _text(nvml: ctypes.CDLL, name: str, *arguments: object) -> str:
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    _call(nvml, name, *arguments, text, ctypes.c_uint(_TEXT_BYTES))
    return text.value.decode(errors="replace")


def _call(nvml: ctypes.CDLL, name: str, *arguments: object) -> None:
    try:
        function = getattr(nvml, name)
    except AttributeError:
        raise NvmlError(f"{name}: the driver is too old for it") from None
    if (code := function(*arguments)) != 0:
        nvml.nvmlErrorString.restype = ctypes.c_char_p
        raise NvmlError(f"{name}: {nvml.nvmlErrorString(code).decode(errors='replace')}")
