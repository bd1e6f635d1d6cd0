"""TensorRT-LLM's own connector classes, from where this version has them."""

from __future__ import annotations

import importlib
from types import ModuleType

# Since 1.3, and until 1.2.
_PATHS = (
    "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",
    "tensorrt_llm._torch.pyexecutor.kv_cache_connector",
)


def _find() -> ModuleType:
    for path in _PATHS:
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            # What the module itself misses is another matter, and not ours to hide.
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise
    raise ImportError(
        "FlexKV's connector for TensorRT-LLM needs a TensorRT-LLM with KV cache connectors (1.1 or later): found none "
        "of " + ", ".join(_PATHS)
    )


_module = _find()
SchedulerBase = _module.KvCacheConnectorScheduler
WorkerBase = _module.KvCacheConnectorWorker
# Some branches of TensorRT-LLM ask workers for loads that failed. Without that there is no way to tell of one.
FAILED_LOADS_ARE_TOLD = hasattr(WorkerBase, "take_failed_load_request_ids")


def rank() -> int:
    """Of this process among those of its engine."""
    from tensorrt_llm._utils import mpi_rank

    return int(mpi_rank())
