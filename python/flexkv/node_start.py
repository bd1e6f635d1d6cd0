"""Starts a node with what the settings say, for `flexkv serve` and for engines that hold their own."""

from __future__ import annotations

import logging
from typing import Any

from flexkv.config import ConfigError, Settings
from flexkv.config.cluster import unreachable_for_others
from flexkv.config.sizes import AutoSize, HostMemory, fitting_cache_size, format_size, read_host_memory
from flexkv.config.ssd import too_large_for_drives, without_size

_log = logging.getLogger("flexkv.node")


def start_node(core: Any, settings: Settings, mode: str, name: str) -> Any:
    """A node that listens. RuntimeError: another one has the name, or the core cannot; ConfigError: its pool does not
    fit, or drives are named without a size. A size that nobody asked for gives way to one that fits."""
    if problems := without_size(settings):
        raise ConfigError(problems)
    for warning in (*too_large_for_drives(settings), *unreachable_for_others(settings)):
        _log.warning("%s", warning)
    if settings.enable_gds:
        _log.warning("GPUDirect Storage is not used: %s; blocks go through host memory", _why_no_gds(settings))
    options = settings.node_options() | {"mode": mode}
    asked = settings.origin("cpu_cache_gb") != "default"
    memory = read_host_memory()
    # The core knows only control groups of version 2; where one of version 1 sets the limit, it would kill us.
    if asked or settings.use_hugepage_cpu_buffer or settings.cpu_cache_bytes <= memory.available:
        try:
            return _listen(core, options, name)
        except MemoryError:
            memory = read_host_memory()
    if asked:
        raise ConfigError([_does_not_fit(settings, memory)])
    size = fitting_cache_size(memory)
    _log.warning(
        "the default host memory of the cache, %s, does not fit: %s %s; taking %s (cpu_cache_gb, FLEXKV_CPU_CACHE_GB)",
        *(format_size(settings.cpu_cache_bytes), format_size(memory.available), memory.bound, format_size(size)),
    )
    try:
        return _listen(core, options | {"pool_bytes": size}, name)
    except MemoryError as error:
        raise ConfigError([f"{_does_not_fit(settings, memory)}; nor does {format_size(size)}: {error}"]) from None


def _why_no_gds(settings: Settings) -> str:
    if settings.ssd_cache_bytes == 0:
        return "there is no SSD tier (ssd_cache_gb is 0)"
    return "this version has no path from drives to the GPU (`flexkv doctor --measure` tells what it would bring here)"


def _listen(core: Any, options: dict[str, Any], name: str) -> Any:
    node = core.Node(options)
    node.listen(options["runtime_dir"], name)
    return node


def _does_not_fit(settings: Settings, memory: HostMemory) -> str:
    auto = isinstance(settings.cpu_cache_bytes, AutoSize)
    return (
        f"cpu_cache_gb: {settings.show('cpu_cache_gb')}{' (auto)' if auto else ''} from "
        f"{settings.origin('cpu_cache_gb')} does not fit in host memory: {format_size(memory.available)} "
        f"{memory.bound}; give less{'' if auto else ', or auto'} (FLEXKV_CPU_CACHE_GB, or --cpu-cache of flexkv serve)"
    )
