"""What our connector is to versions of vLLM that have more, or fewer, hooks than the installed one."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from flexkv.integration.vllm import compat
from flexkv.integration.vllm.connector import FlexKVConnector
from flexkv.integration.vllm.groups import UnsupportedGroups, groups_of
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl
from test_groups import CONFIG, FULL, WINDOW, described
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

# Of all versions from 0.26 on, with the first one that has it (checked in their sources).
NEW_HOOKS = {
    "KVConnectorTransferResults": "0.30",
    "CacheHitSource": "0.32",
}


@pytest.fixture
def as_in_026(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`compat` as it finds itself with vLLM 0.26."""
    for name in NEW_HOOKS:
        monkeypatch.delattr(base, name, raising=False)
    yield importlib.reload(compat)
    monkeypatch.undo()
    importlib.reload(compat)


def test_without_new_hooks_only_their_features_are_gone(as_in_026: Any) -> None:
    assert as_in_026.TransferResults is None
    assert as_in_026.HOST_MEMORY is None
    assert len(groups_of(CONFIG, described(FULL))) == 1
    with pytest.raises(UnsupportedGroups, match="cannot be told which request's load has failed"):
        groups_of(CONFIG, described(FULL, WINDOW))


def test_several_groups_need_to_know_what_a_hash_stands_for() -> None:
    with pytest.raises(UnsupportedGroups, match="does not tell over how many tokens"):
        groups_of(CONFIG, described(FULL, WINDOW, hash_tokens=None))


def test_names_that_a_description_of_groups_may_lack() -> None:
    bare: Any = SimpleNamespace(kv_cache_groups=["a", "b"])
    assert list(compat.prefix_cacheable(bare)) == [0, 1]
    assert compat.hash_tokens(bare) is None


def test_sleep_hooks_as_033_and_later_ones_call_them() -> None:
    assert FlexKVConnector.supports_sleep_mode(kv_transfer_config=None) is True  # type: ignore[arg-type]
    for name in ("unregister_kv_caches", "release_kv_caches", "restore_kv_caches"):
        inspect.signature(getattr(FlexKVConnector, name)).bind("self")


def config(sleep_mode: bool) -> Any:
    transfer = SimpleNamespace(kv_connector_extra_config=None, kv_load_failure_policy="recompute")
    return SimpleNamespace(kv_transfer_config=transfer, model_config=SimpleNamespace(enable_sleep_mode=sleep_mode))


def test_who_waits_for_saves_before_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(base.KVConnectorBase_V1, "unregister_kv_caches", raising=False)
    assert compat.sleep_follows_reset(config(sleep_mode=True))
    assert not compat.sleep_follows_reset(config(sleep_mode=False))
    monkeypatch.setattr(base.KVConnectorBase_V1, "unregister_kv_caches", lambda self: None, raising=False)
    assert not compat.sleep_follows_reset(config(sleep_mode=True)), "its workers are told themselves"


@pytest.mark.parametrize("role", list(KVConnectorRole))
def test_behind_vllms_own_connector_flexkv_is_off_where_the_engine_may_sleep(
    caplog: pytest.LogCaptureFixture, role: KVConnectorRole
) -> None:
    with caplog.at_level(logging.WARNING, "flexkv.vllm"):
        logging.getLogger("flexkv").propagate = True
        off = FlexKVConnectorV1Impl(config(sleep_mode=True), role)
    assert off.scheduler is None
    assert off.worker is None
    told = [record.message for record in caplog.records if "sleep mode" in record.message]
    assert len(told) == (1 if role == KVConnectorRole.SCHEDULER else 0)
