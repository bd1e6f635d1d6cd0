"""NVIDIA Dynamo with prefill and decode apart, on CPUs: prefill workers keep and load through FlexKV, the decode worker pulls
each prompt's KV from them through NIXL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dynamo import FLEXKV, FLEXKV_FULL, PYTHON, Deployment, Hits, Worker
from engine import EngineConfig, run_engine
from scenarios import ANSWER, LONG, WHOLE_POOL, generate, prompt, whole_blocks

pytestmark = [
    pytest.mark.skipif(
        not Path(PYTHON).is_file(), reason=f"no environment with Dynamo at {PYTHON}: scripts/setup --tests makes it"
    ),
    pytest.mark.skipif(
        "DYNAMO_DISAGGREGATED" not in os.environ, reason="three workers, 9 GB, minutes: only with DYNAMO_DISAGGREGATED=1"
    ),
]

PROMPTS = {name: prompt(f"dynamo {name}", LONG) for name in ("pd", "multi")}


def both(outer: dict[str, Any], flexkv: dict[str, Any]) -> dict[str, Any]:
    """FlexKV first, NIXL second."""
    nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}
    return {
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [flexkv, nixl]},
        **outer,
    }


PD_CONNECTOR = {"kv_connector": "PdConnector", "kv_connector_module_path": "kvbm.vllm_integration.connector"}
CONNECTORS = {
    "pd": both(PD_CONNECTOR, FLEXKV),
    "multi": both({"kv_connector": "MultiConnector"}, FLEXKV_FULL),
}


@pytest.fixture(scope="module")
def expected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What the same vLLM says without FlexKV, without NIXL and without Dynamo."""
    steps = [generate(name, [tokens]) for name, tokens in PROMPTS.items()]
    directory = tmp_path_factory.mktemp("plain") / "engine"
    results = run_engine(EngineConfig(flexkv=False), tiny_model, steps, directory, python=PYTHON)
    return {name: result.outputs[0] for name, result in results.items()}


@pytest.fixture(scope="module")
def prefill(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Deployment, dict[str, Worker]]]:
    with Deployment(tmp_path_factory.mktemp("dynamo")) as deployment:
        deployment.start_node()
        deployment.start_frontend("--router-mode", "kv")
        # NIXL wants both sides alike, and with vLLM's own connector for FlexKV there is no hybrid manager.
        alike = "--disable-hybrid-kv-cache-manager"
        workers = {
            name: deployment.start_worker(name, tiny_model, connector, alike, "--disaggregation-mode", "prefill")
            for name, connector in CONNECTORS.items()
        }
        pulls = {"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}
        decode = deployment.start_worker("decode", tiny_model, pulls, alike, "--disaggregation-mode", "decode")
        deployment.wait_until_ready(*workers.values(), decode)
        yield deployment, workers


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_prefill_worker_loads_what_it_evicted_and_hands_it_on(
    prefill: tuple[Deployment, dict[str, Worker]], expected: dict[str, list[int]], name: str
) -> None:
    deployment, workers = prefill
    worker = workers[name]

    def ask(tokens: list[int], answer: int = ANSWER) -> list[int]:
        return deployment.ask(tokens, answer, prefill_worker_id=worker.id).tokens

    assert ask(PROMPTS[name]) == expected[name]
    for i in range(2):  # nothing of it is left in the worker's own cache
        ask(prompt(f"filler {i}", WHOLE_POOL), 1)
    before = worker.hits
    assert ask(PROMPTS[name]) == expected[name]
    assert worker.hits - before == Hits(own=0, flexkv=whole_blocks(LONG))
