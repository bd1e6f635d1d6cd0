"""The part of TensorRT-LLM that a connector sees, under the module paths of several versions, for machines without it.

Only names and signatures, as its documentation and sources have them; what is behind them is trtllm_executor.py."""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

_PYEXECUTOR = "tensorrt_llm._torch.pyexecutor"
# Version: the module that has the connector classes.
MODULES = {
    "1.1": f"{_PYEXECUTOR}.kv_cache_connector",
    "1.2": f"{_PYEXECUTOR}.kv_cache_connector",
    "1.3": f"{_PYEXECUTOR}.connectors.kv_cache_connector",
    "branch": f"{_PYEXECUTOR}.connectors.kv_cache_connector",  # with a way to tell of failed loads
}

_rank = 0


def set_rank(rank: int) -> None:
    """Of the process that is played from now on."""
    global _rank
    _rank = rank


class Worker(ABC):
    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        self._metadata: Any = None

    def bind_connector_meta(self, metadata: object) -> None:
        self._metadata = metadata

    def register_forward_pass_callable(self) -> Any:
        return None

    @abstractmethod
    def register_kv_caches(self, kv_cache_tensor: Any) -> None: ...
    @abstractmethod
    def start_load_kv(self, stream: Any) -> None: ...
    @abstractmethod
    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None: ...
    @abstractmethod
    def save_kv_layer(self, layer_idx: int, stream: Any) -> None: ...
    @abstractmethod
    def wait_for_save(self, stream: Any) -> None: ...
    @abstractmethod
    def get_finished(self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]) -> Any: ...


class WorkerOfBranch(Worker):
    def take_failed_load_request_ids(self) -> set[int]:
        return set()


class Scheduler(ABC):
    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args

    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> object: ...
    @abstractmethod
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]: ...
    @abstractmethod
    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool: ...
    @abstractmethod
    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None: ...


@dataclass
class RequestDataOf11:
    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int


@dataclass
class RequestData(RequestDataOf11):
    num_scheduled_tokens: int = 0


@dataclass
class RequestDataOf13(RequestData):
    block_hashes: list[int] = field(default_factory=list)
    priorities: list[int] | None = None
    cache_salt: str | None = None


@dataclass
class SchedulerOutput:
    new_requests: list[Any] = field(default_factory=list)
    cached_requests: list[Any] = field(default_factory=list)


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> ModuleType:
    """Puts a TensorRT-LLM of this version in place, and returns our adapter as imported with it."""
    path = MODULES[version]
    contents: dict[str, dict[str, Any]] = {
        "tensorrt_llm._utils": {"mpi_rank": lambda: _rank},
        path: {
            "KvCacheConnectorWorker": WorkerOfBranch if version == "branch" else Worker,
            "KvCacheConnectorScheduler": Scheduler,
        },
    }
    for name in [name for name in sys.modules if "tensorrt_llm" in name]:
        monkeypatch.delitem(sys.modules, name)
    for module_path, content in contents.items():
        parts = module_path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                module = ModuleType(name)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, name, module)
        vars(sys.modules[module_path]).update(content)
    set_rank(0)
    return importlib.import_module("flexkv.integration.tensorrt_llm.trtllm_adapter")


def request_data(version: str, **values: Any) -> Any:
    kind = {"1.1": RequestDataOf11, "1.2": RequestData}.get(version, RequestDataOf13)
    return kind(**{name: value for name, value in values.items() if name in kind.__dataclass_fields__})
