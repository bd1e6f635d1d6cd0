"""FlexKV beside another connector, under vLLM's MultiConnector: both save, the first one that has a prompt loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flexkv.integration.vllm.connector  # noqa: F401: registers its name
from engine import EngineConfig, run_engine
from flexkv.integration.vllm.stats import COUNTS
from scenarios import LONG, cold_warm_partial, whole_blocks
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

_FLEXKV = {
    "kv_connector": "FlexKVConnector",
    "kv_connector_module_path": "flexkv.integration.vllm.connector",
    "kv_role": "kv_both",
}


def _config(directory: Path) -> EngineConfig:
    files = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(directory)},
    }
    both: dict[str, Any] = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [_FLEXKV, files]},
    }
    return EngineConfig(flexkv=True, in_process=False, pool_blocks=110, more=(("kv_transfer_config", both),))


def test_beside_a_connector_that_writes_files(tiny_model: Path, tmp_path: Path) -> None:
    steps = cold_warm_partial()
    without = run_engine(EngineConfig(flexkv=False, pool_blocks=110), tiny_model, steps, tmp_path / "baseline")
    got = run_engine(_config(tmp_path / "files"), tiny_model, steps, tmp_path / "engine")
    for name in without:
        assert got[name].outputs == without[name].outputs, name
    assert [got[name].flexkv_hits for name in ("cold", "warm")] == [0, whole_blocks(LONG)]
    assert any((tmp_path / "files").iterdir())


def test_its_statistics_are_found_by_name() -> None:
    """As vLLM's server logs them; a name that it does not know would end it."""
    stats = MultiConnector.build_kv_connector_stats({"FlexKVConnector": dict.fromkeys(COUNTS, 2)})
    assert stats is not None
    assert stats.reduce()["FlexKVConnector"]["FlexKV loaded blocks"] == 2
