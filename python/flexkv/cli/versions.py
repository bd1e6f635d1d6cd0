"""`flexkv version`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import flexkv
from flexkv.cli.common import load_core, print_json

_CUDA_LIBRARY = "libflexkv_cuda.so"


def package_version() -> str:
    try:
        return importlib.metadata.version("flexkv")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def cuda_library() -> str | None:
    """The CUDA device library that would be loaded, or None."""
    # Straight from the variable: the version must be printable whatever is wrong with the configuration.
    configured = os.environ.get("FLEXKV_CUDA_LIBRARY")
    candidates = [Path(configured)] if configured else [Path(folder) / _CUDA_LIBRARY for folder in flexkv.__path__]
    return next((str(path) for path in candidates if path.is_file()), None)


def core_info() -> dict[str, Any]:
    try:
        core = load_core()
    except ImportError as error:
        return {"present": False, "error": str(error)}
    info = core.build_info() if hasattr(core, "build_info") else {}
    return {"present": True, **info}


def run(as_json: bool) -> None:
    core = core_info()
    library = cuda_library()
    if as_json:
        print_json(
            {
                "flexkv": package_version(),
                "core": core,
                "cuda_library": library,
                "python": platform.python_version(),
                "platform": platform.platform(),
            }
        )
        return
    details = ", ".join(f"{key} {value}" for key, value in core.items() if key not in ("present", "error"))
    print(f"flexkv    {package_version()}")
    print("core      " + (details or "present" if core["present"] else f"missing: {core['error']}"))
    print("CUDA      " + (library or "no device library: GPUs are not used"))
    print(f"Python    {platform.python_version()}")
    print(f"platform  {platform.platform()}")
