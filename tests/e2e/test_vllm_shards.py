"""Two tensor parallel ranks that hold the same KV: what is loaded is what was computed, and host memory holds it once."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine import BLOCK, EngineConfig, run_engine
from flexkv.demo.model import TINY_SHAPE, make_model
from mla_model import LATENT_BYTES_PER_TOKEN, make_mla_model
from scenarios import LONG, emptied, generate, prompt, whole_blocks

_ONE_HEAD = dataclasses.replace(TINY_SHAPE, kv_heads=1)
_CONFIG = EngineConfig(flexkv=True, in_process=False, tensor_parallel=2, pool_blocks=110)


def make_one_head(directory: Path) -> Path:
    return make_model(directory, _ONE_HEAD)


# vLLM's latents on CPUs come in blocks of 16 tokens.
@pytest.mark.parametrize(
    ("make", "block_bytes"),
    [(make_mla_model, 16 * LATENT_BYTES_PER_TOKEN), (make_one_head, BLOCK * _ONE_HEAD.kv_bytes_per_token)],
    ids=["latents", "one_head"],
)
def test_what_ranks_hold_alike_is_stored_once(make: Callable[[Path], Path], block_bytes: int, tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    status_file = tmp_path / "status.json"
    ask = [sys.executable, "-m", "flexkv.cli", "status", "--json"]
    # One prompt at a time: what vLLM's latent attention for CPUs (0.32) makes of several is not the same in each run.
    tail = prompt("tail", LONG)
    prompts = {name: [prompt(name, BLOCK) + tail] for name in ("one", "other")}
    steps: list[dict[str, Any]] = [
        *(generate(f"{name} cold", ids) for name, ids in prompts.items()),
        *emptied(),
        *(generate(f"{name} warm", ids) for name, ids in prompts.items()),
        {"op": "run", "argv": ["sh", "-c", '"$@" > "$0"', str(status_file), *ask]},
    ]
    got = run_engine(_CONFIG, model, steps, tmp_path / "engine")
    for name in prompts:
        assert got[f"{name} cold"].flexkv_hits == 0
        assert got[f"{name} warm"].flexkv_hits >= whole_blocks(LONG + BLOCK)
        assert got[f"{name} warm"].outputs == got[f"{name} cold"].outputs
    assert got["one cold"].outputs != got["other cold"].outputs
    (node,) = json.loads(status_file.read_text())["nodes"]
    (space,) = node["spaces"]
    assert space["block_bytes"] == block_bytes
    copied = node["transfers"]
    assert copied["to_host"]["bytes"] == copied["to_host"]["blocks"] * block_bytes > 0
    assert copied["to_device"]["bytes"] == 2 * copied["to_device"]["blocks"] * block_bytes > 0
