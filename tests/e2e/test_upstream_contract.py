"""What vLLM's connector interface is, as we rely on it: an engine release that changes it fails here, loudly.

First half: the class FlexKVConnectorV1 of the installed vLLM, against a fake implementation. Second half: signatures.
"""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.flexkv_connector import FlexKVConnectorV1

ADAPTER = "flexkv.integration.vllm.vllm_v1_adapter"
PACKAGES = [ADAPTER.rsplit(".", n)[0] for n in (3, 2, 1)]


class Metadata(KVConnectorMetadata):
    pass


def argument(name: str) -> Any:
    return types.SimpleNamespace(argument=name)


# Method, positional arguments, keyword arguments, what the implementation returns.
DELEGATED: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = [
    ("shutdown", (), {}, None),
    ("register_kv_caches", ({"layer": argument("tensor")},), {}, None),
    ("start_load_kv", (argument("context"),), {"extra_arg": "x"}, None),
    ("wait_for_layer_load", ("layer",), {}, None),
    ("save_kv_layer", ("layer", argument("tensor"), argument("attention")), {"extra_arg": "x"}, None),
    ("wait_for_save", (), {}, None),
    ("get_finished", ({"a", "b"},), {}, ({"a"}, {"b"})),
    ("get_block_ids_with_load_errors", (), {}, {7, 8}),
    ("get_kv_connector_stats", (), {}, None),
    ("get_num_new_matched_tokens", (argument("request"), 16), {}, (10, False)),
    ("update_state_after_alloc", (argument("request"), argument("blocks"), 10), {}, None),
    ("build_connector_meta", (argument("scheduler output"),), {}, Metadata()),
    ("update_connector_output", (argument("connector output"),), {}, None),
    ("request_finished", (argument("request"), [1, 2]), {}, (True, {"key": "val"})),
    ("take_events", (), {}, [argument("event")]),
]
NAMES = [entry[0] for entry in DELEGATED]


@pytest.fixture
def fake_adapter(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """An implementation class that records its calls, in place of ours."""
    implementation = MagicMock(name="FlexKVConnectorV1Impl")
    for package in PACKAGES:
        module = types.ModuleType(package)
        module.__path__ = []  # a package, with nothing of its own to find
        monkeypatch.setitem(sys.modules, package, module)
    adapter = types.ModuleType(ADAPTER)
    adapter.FlexKVConnectorV1Impl = implementation
    monkeypatch.setitem(sys.modules, ADAPTER, adapter)
    return implementation


def vllm_config() -> MagicMock:
    config = MagicMock(name="VllmConfig")
    config.kv_transfer_config.kv_connector = "FlexKVConnectorV1"
    return config


def test_registered_under_its_name() -> None:
    config = types.SimpleNamespace(kv_connector="FlexKVConnectorV1", kv_connector_module_path=None)
    assert KVConnectorFactory.get_connector_class(config) is FlexKVConnectorV1


@pytest.mark.parametrize("role", list(KVConnectorRole))
def test_constructor_hands_on_configuration_and_role(fake_adapter: MagicMock, role: KVConnectorRole) -> None:
    config = vllm_config()
    FlexKVConnectorV1(config, role, argument("kv cache config"))
    fake_adapter.assert_called_once_with(config, role)


@pytest.mark.parametrize(("name", "arguments", "keywords", "result"), DELEGATED, ids=NAMES)
def test_delegates_once(
    fake_adapter: MagicMock, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any
) -> None:
    connector = FlexKVConnectorV1(vllm_config(), KVConnectorRole.WORKER, argument("kv cache config"))
    implementation = fake_adapter.return_value
    getattr(implementation, name).return_value = result
    returned = getattr(connector, name)(*arguments, **keywords)
    getattr(implementation, name).assert_called_once_with(*arguments, **keywords)
    assert [call[0] for call in implementation.method_calls] == [name]
    if result is not None:
        assert returned is result


def test_stats_are_passed_back(fake_adapter: MagicMock) -> None:
    connector = FlexKVConnectorV1(vllm_config(), KVConnectorRole.WORKER, argument("kv cache config"))
    stats = argument("stats")
    fake_adapter.return_value.get_kv_connector_stats.return_value = stats
    assert connector.get_kv_connector_stats() is stats


def test_forwards_nothing_that_is_not_listed() -> None:
    own = {name for name, value in vars(FlexKVConnectorV1).items() if inspect.isfunction(value)}
    assert own == {"__init__", *NAMES}


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "flexkv" or name.startswith("flexkv.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flexkv", None)  # importing it raises ImportError
    with pytest.raises(ImportError, match=r"(?i)flexkv") as raised:
        FlexKVConnectorV1(vllm_config(), KVConnectorRole.SCHEDULER, argument("kv cache config"))
    assert "https://github.com/taco-project/FlexKV" in str(raised.value)


# Parameters with their kinds and defaults, as of vLLM 0.32.0; annotations are free to change.
BASE_SIGNATURES = {
    "__init__": "(self, vllm_config, role, kv_cache_config)",
    "bind_connector_metadata": "(self, connector_metadata)",
    "bind_gpu_block_pool": "(self, gpu_block_pool)",
    "build_connector_meta": "(self, scheduler_output)",
    "build_connector_worker_meta": "(self)",
    "build_kv_connector_stats": "(cls, data=None)",
    "build_prom_metrics": "(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues)",
    "clear_connector_metadata": "(self)",
    "get_block_ids_with_load_errors": "(self)",
    "get_external_cache_hit_sources": "(self, request, num_external_tokens)",
    "get_finished": "(self, finished_req_ids)",
    "get_finished_count": "(self)",
    "get_kv_connector_kv_cache_events": "(self)",
    "get_kv_connector_stats": "(self)",
    "get_loaded_kv_cache_group_ids": "(self, request)",
    "get_num_new_matched_tokens": "(self, request, num_computed_tokens)",
    "get_required_kvcache_layout": "(cls, vllm_config)",
    "get_transfer_results": "(self, finished_req_ids)",
    "handle_preemptions": "(self, kv_connector_metadata)",
    "on_new_request": "(self, request)",
    "register_kv_caches": "(self, kv_caches)",
    "request_finished": "(self, request, block_ids)",
    "requires_piecewise_for_cudagraph": "(cls, extra_config)",
    "reset_cache": "(self)",
    "save_kv_layer": "(self, layer_name, kv_layer, attn_metadata, **kwargs)",
    "shutdown": "(self)",
    "start_load_kv": "(self, forward_context, **kwargs)",
    "take_events": "(self)",
    "update_connector_output": "(self, connector_output)",
    "update_state_after_alloc": "(self, request, blocks, num_external_tokens)",
    "wait_for_layer_load": "(self, layer_name)",
    "wait_for_save": "(self)",
}
BASE_PROPERTIES = ("requires_kv_delivery", "role")


def signature(owner: type, name: str) -> str:
    function = inspect.getattr_static(owner, name)
    if isinstance(function, (classmethod, staticmethod)):
        function = function.__func__
    found = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("name", BASE_SIGNATURES)
def test_base_signature(name: str) -> None:
    assert signature(KVConnectorBase_V1, name) == BASE_SIGNATURES[name]


@pytest.mark.parametrize("name", BASE_PROPERTIES)
def test_base_property(name: str) -> None:
    assert isinstance(inspect.getattr_static(KVConnectorBase_V1, name), property)


def test_base_has_no_new_abstract_method() -> None:
    assert KVConnectorBase_V1.__abstractmethods__ == {
        "build_connector_meta",
        "get_num_new_matched_tokens",
        "save_kv_layer",
        "start_load_kv",
        "update_state_after_alloc",
        "wait_for_layer_load",
        "wait_for_save",
    }


def test_hma_signature() -> None:
    assert signature(SupportsHMA, "request_finished_all_groups") == "(self, request, block_ids)"


def test_our_implementation_takes_the_arguments() -> None:
    """Calls of the wrapper bind to our methods, positionally and with the extra keywords that it may pass."""
    from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl

    inspect.signature(FlexKVConnectorV1Impl).bind(argument("vllm config"), KVConnectorRole.WORKER)
    for name, arguments, keywords, _ in DELEGATED:
        inspect.signature(getattr(FlexKVConnectorV1Impl, name)).bind(argument("self"), *arguments, **keywords)
