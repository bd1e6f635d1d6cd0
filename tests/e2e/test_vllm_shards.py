"""Two ranks of tensor parallelism with the same KV: each loads the bytes that were computed, stored once."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine import BLOCK, MAX_TOKENS, EngineConfig, run_engine
from flexkv.demo.model import TINY_SHAPE, make_model
from mla_model import LATENT_BYTES_PER_TOKEN, make_mla_model
from scenarios import ANSWER, LONG, emptied, generate, prompt

_ONE_HEAD = dataclasses.replace(TINY_SHAPE, kv_heads=1)
_CONFIG = EngineConfig(
    flexkv=True,
    in_process=False,
    tensor_parallel=2,
    pool_blocks=110,
    environment=(("VLLM_ALLOW_INSECURE_SERIALIZATION", "1"),),  # to look into the workers' memory
)


def make_one_head(directory: Path) -> Path:
    return make_model(directory, _ONE_HEAD)


# Not by their outputs alone: vLLM's latent attention for CPUs (0.32), whose blocks have 16 tokens, computes the same
# prompt a little differently behind blocks that are there and with other prompts beside it, and these models tell.
@pytest.mark.parametrize(
    ("make", "block_tokens", "token_bytes"),
    [(make_mla_model, 16, LATENT_BYTES_PER_TOKEN), (make_one_head, BLOCK, _ONE_HEAD.kv_bytes_per_token)],
    ids=["latents", "one_head"],
)
def test_what_ranks_hold_alike_is_stored_once_and_loaded_by_all(
    make: Callable[[Path], Path], block_tokens: int, token_bytes: int, tmp_path: Path
) -> None:
    model = make(tmp_path / "model")
    status = tmp_path / "status.json"
    looks = {name: tmp_path / f"{name}.json" for name in ("computed", "overwritten", "loaded")}
    look = {name: {"op": "kv", "path": str(path)} for name, path in looks.items()}
    long = prompt("alike", LONG)
    ask = [sys.executable, "-m", "flexkv.cli", "status", "--json"]
    steps: list[dict[str, Any]] = [
        generate("cold", [long]),
        look["computed"],
        *(generate(f"other {i}", [prompt(f"other {i}", MAX_TOKENS - ANSWER)]) for i in range(4)),
        look["overwritten"],
        *emptied(),
        generate("warm", [long]),
        look["loaded"],
        {"op": "run", "argv": ["sh", "-c", '"$@" > "$0"', str(status), *ask]},
    ]
    got = run_engine(_CONFIG, model, steps, tmp_path / "engine")
    assert (got["cold"].flexkv_hits, got["warm"].flexkv_hits) == (0, (LONG - 1) // block_tokens * block_tokens)

    computed, overwritten, loaded = (json.loads(path.read_text()) for path in looks.values())
    first, second = ({block for block in rank if block} for rank in computed)
    assert first == second
    for rank in range(2):
        assert not first & set(overwritten[rank])
        assert len(first & set(loaded[rank])) >= (LONG - 1) // block_tokens

    (node,) = json.loads(status.read_text())["nodes"]
    (space,) = node["spaces"]
    block_bytes = block_tokens * token_bytes
    assert space["block_bytes"] == block_bytes
    copied = node["transfers"]
    assert copied["to_host"]["bytes"] == copied["to_host"]["blocks"] * block_bytes > 0
    assert copied["to_device"]["bytes"] == 2 * copied["to_device"]["blocks"] * block_bytes > 0
