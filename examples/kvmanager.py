"""Stores the KV of a prompt and loads it back, through KVManager and KVTPClient, in one process and without a GPU.

usage: python examples/kvmanager.py
"""

from __future__ import annotations

import os

import numpy as np
import torch

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.request import KVResponseStatus
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient

LAYERS, BLOCKS, BLOCK_TOKENS, HEADS, HEAD_SIZE = 4, 64, 16, 2, 64


def slots(blocks: list[int]) -> torch.Tensor:
    """The token slots of whole blocks, as an engine's block manager has them."""
    return torch.cat([torch.arange(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS) for block in blocks])


def main() -> None:
    os.environ.setdefault("FLEXKV_CPU_CACHE_GB", "64MB")
    # The engine's KV cache: keys and values of each layer in one tensor, as vLLM has them.
    kv_caches = [torch.randn(2, BLOCKS, BLOCK_TOKENS, HEADS, HEAD_SIZE) for _ in range(LAYERS)]

    # The scheduler's side.
    manager = KVManager(
        ModelConfig(num_layers=LAYERS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.float32),
        CacheConfig(tokens_per_block=BLOCK_TOKENS),
    )
    manager.start()
    # In each process that owns KV tensors; here it is the same one.
    rank = KVTPClient(manager.gpu_register_port, dp_client_id=0, device_id=0)
    rank.register_to_server(
        kv_caches,
        KVCacheLayout(KVCacheLayoutType.LAYERFIRST, LAYERS, BLOCKS, BLOCK_TOKENS, HEADS, HEAD_SIZE),
    )
    print("ready:", manager.is_ready())

    prompt = np.arange(100) + 7
    computed_in, loaded_to = [3, 17, 4, 42, 5, 6], [20, 21, 22, 23, 24, 25]
    stored = manager.put_async(prompt[:96], slots(computed_in))
    print("stored:", manager.wait(stored)[stored].status.name)

    task, found = manager.get_match(prompt)
    print("found:", int(found.sum()), "of", len(prompt), "tokens")
    manager.launch(task, slots(loaded_to))
    assert manager.wait(task)[task].status is KVResponseStatus.SUCCESS
    equal = all(torch.equal(layer[:, computed_in], layer[:, loaded_to]) for layer in kv_caches)
    print("equal, byte for byte:", equal)

    rank.shutdown()
    manager.shutdown()


if __name__ == "__main__":
    main()
