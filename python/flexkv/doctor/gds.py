"""GPUDirect Storage: could it be used here? FlexKV has no path of its own through it: docs/decisions/0011."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from flexkv.config import Settings
from flexkv.doctor.cufile import CuFileError, load_library, version_of
from flexkv.doctor.drives import Mount, mount_of
from flexkv.doctor.finding import Finding

LOOKED_AT = "GPUDirect Storage"
_FILE_SYSTEMS = ("ext4", "xfs")


def check_gds(settings: Settings) -> Finding:
    """Never wrong and never to be changed: the path through host memory is the one that is used."""
    reasons = []
    try:
        path, library = load_library()
        usable = f"cuFile {version_of(library)} ({path})"
    except CuFileError as error:
        usable = ""
        reasons.append(f"{error}; it is in the wheel nvidia-cufile")
    through, why_not = kernel_support()
    if why_not:
        reasons.append(why_not)
    if settings.ssd_cache_bytes == 0:
        reasons.append("there is no SSD tier")
    else:
        there = [path for path in settings.ssd_cache_dir if os.path.isdir(path)]
        reasons += [f"{path}: {why}" for path in there if (why := file_system_refusal(mount_of(path)))]
    if reasons:
        return Finding(LOOKED_AT, f"not usable: {'; '.join(reasons)}. Blocks go through host memory")
    return Finding(
        LOOKED_AT,
        f"usable: {usable}, {through}. Blocks go through host memory all the same; `flexkv doctor --measure` compares",
    )


def kernel_support(root: Path = Path("/")) -> tuple[str, str]:
    """What lets a drive write to GPU memory, and if nothing does, why not; one of both is empty."""
    if (root / "proc/driver/nvidia-fs").is_dir() or any((root / "dev").glob("nvidia-fs*")):
        return "nvidia-fs is loaded", ""
    missing = "the kernel module nvidia-fs is not loaded"
    if not _kernel_has_p2pdma(root):
        return "", f"{missing}, and this kernel ({platform.release()}) has no PCI P2PDMA"
    if "RMForceStaticBar1=1" not in _text_of(root / "proc/driver/nvidia/params"):
        return "", f"{missing}, and the NVIDIA driver does not offer P2PDMA (no RMForceStaticBar1=1)"
    return "PCI P2PDMA is offered", ""


def file_system_refusal(mount: Mount) -> str:
    if mount.file_system not in _FILE_SYSTEMS:
        return f"{mount.file_system} is not {' or '.join(_FILE_SYSTEMS)}"
    if not mount.device.startswith("nvme"):
        return f"{mount.device} is no NVMe drive"
    if mount.file_system == "ext4" and ("data=journal" in mount.options or "data=writeback" in mount.options):
        return "ext4 must be mounted with data=ordered"
    return ""


def _kernel_has_p2pdma(root: Path) -> bool:
    try:
        with (root / "proc/kallsyms").open(errors="replace") as symbols:
            return any("p2pdma_pgmap_ops" in line for line in symbols)
    except OSError:
        return False


def _text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
