"""GPUs: the driver, our CUDA library, and how near they are to host memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from flexkv.doctor import nvml
from flexkv.doctor.finding import Finding, better, wrong


def check_gpus(core: Any | None) -> Iterator[Finding]:
    try:
        driver = nvml.read_driver()
    except (OSError, nvml.NvmlError) as error:
        yield no_driver(str(error), nvml.driver_is_there())
        return
    yield Finding("NVIDIA driver", f"{driver.version}, runs CUDA up to {driver.cuda}")
    if not driver.gpus:
        yield better("GPUs", "none", "pass them to the container (--gpus all), or leave it: engines on CPUs run")
        return
    for gpu in driver.gpus:
        yield link(gpu)
    if core is not None:
        yield cuda_library(core)
    yield numa({gpu.index: numa_node(gpu.pci_address) for gpu in driver.gpus})


def no_driver(why: str, kernel_part: bool) -> Finding:
    if kernel_part:
        return wrong(
            "NVIDIA driver", why, "the kernel's part is loaded: install the same version's libraries, or reboot"
        )
    return better(
        "NVIDIA driver",
        f"none ({why})",
        "only engines on CPUs run; for GPUs install the driver, or start the container with --gpus all",
    )


def link(gpu: nvml.Gpu) -> Finding:
    looked_at = f"GPU {gpu.index}"
    found = f"{gpu.name}, {gpu.pci_address}"
    if gpu.link is None or gpu.link_most is None:
        return Finding(looked_at, f"{found}, the driver tells nothing of its PCIe link")
    found += f", PCIe {gpu.link.generation} x{gpu.link.width} of {gpu.link_most.generation} x{gpu.link_most.width}"
    if gpu.link.width < gpu.link_most.width:
        return better(
            looked_at, f"{found}: lanes are missing, copies take longer", "another slot, or seat the card anew"
        )
    # Not a matter of the slot only: a GPU at rest lowers it.
    return Finding(looked_at, found + (" (rises under load)" if gpu.link.generation < gpu.link_most.generation else ""))


def cuda_library(core: Any) -> Finding:
    """Of the first GPU: a context on each would take seconds and memory that engines use."""
    try:
        return Finding("CUDA library of FlexKV", f"opens {core.cuda_device(0)}")
    except RuntimeError as error:
        return wrong(
            "CUDA library of FlexKV",
            str(error),
            "install a driver or a wheel that fits; until then engines on GPUs run without the cache",
        )


def numa_node(pci_address: str, sys: Path = Path("/sys")) -> int | None:
    try:
        node = int((sys / "bus/pci/devices" / pci_address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def numa(gpus: dict[int, int | None], sys: Path = Path("/sys"), cpus: Set[int] | None = None) -> Finding:
    """`gpus`: the node of each. `cpus`: those that this process may run on; the pool lies where they are."""
    nodes = _nodes(sys)
    if len(nodes) < 2:
        return Finding("NUMA", "one node")
    allowed = os.sched_getaffinity(0) if cpus is None else cpus
    here = {node for node, its_cpus in nodes.items() if its_cpus & allowed}
    theirs = {node for node in gpus.values() if node is not None}
    places = ", ".join(f"GPU {index} on {'?' if node is None else node}" for index, node in gpus.items())
    found = f"{len(nodes)} nodes; this process runs on {_join(here)}; {places}"
    if not theirs or here == theirs:
        return Finding("NUMA", found)
    return better(
        "NUMA",
        f"{found}: copies may cross nodes",
        f"numactl --cpunodebind={_join(theirs)} --membind={_join(theirs)} before the engine (or flexkv serve); an "
        "engine of one GPU: that GPU's node",
    )


def _nodes(sys: Path) -> dict[int, set[int]]:
    """The processors of each node that has some."""
    found = {}
    for place in (sys / "devices/system/node").glob("node[0-9]*"):
        try:
            cpus = _numbers((place / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        if cpus:
            found[int(place.name.removeprefix("node"))] = cpus
    return found


def _numbers(text: str) -> set[int]:
    """0-3,8 -> 0 1 2 3 8"""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _join(nodes: Set[int]) -> str:
    return ",".join(map(str, sorted(nodes)))
