"""What differs between the versions of vLLM that we serve (0.26 to 0.33), in one place. Asked for by name, never by version
number: what a version lacks costs the feature that rests on it, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.output import SchedulerOutput

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

# How loads ended, by request. None: vLLM asks for finished requests and for failed blocks apart, and takes failed blocks
# only of models with one KV cache group.
TransferResults: Any = getattr(base, "KVConnectorTransferResults", None)

# What vLLM counts our hits as; None: it does not tell its sources apart.
HOST_MEMORY: Any = getattr(getattr(base, "CacheHitSource", None), "HOST", None)

# Whether vLLM, where it zeroes the blocks that it hands out, leaves those alone that are loaded beside its steps.
LEAVES_LOADED_BLOCKS = hasattr(base.KVConnectorBase_V1, "get_loaded_kv_cache_group_ids")

# Whether vLLM says of each step which device blocks hold complete states: see complete_states().
TELLS_STATES = hasattr(SchedulerOutput, "kv_connector_block_state")


def complete_states(output: SchedulerOutput) -> Iterator[tuple[str, int, int, int]]:
    """(request, KV cache group, device block, tokens): once the step has ended, and until one that is allocated the block
    overwrites it, the block holds the state after so many tokens of the request, all of them certain."""
    blocks = getattr(output, "kv_connector_block_state", None)
    for request_id, states in (blocks.boundary_state_offloads if blocks is not None else {}).items():
        for state in states:
            yield request_id, *state


def overwritten_besides(output: SchedulerOutput) -> list[int]:
    """Device blocks that the step overwrites, of which no request's block table tells: zeroed ones may belong to a request
    that was preempted again before the step went out."""
    zeroed = getattr(output, "new_block_ids_to_zero", None) or []
    return [*zeroed, *(copy.dst_block_id for copy in getattr(output, "kv_cache_block_copies", None) or ())]


def prefix_cacheable(kv_cache_config: KVCacheConfig) -> Collection[int]:
    """The KV cache groups whose blocks vLLM names by hashes."""
    every = range(len(kv_cache_config.kv_cache_groups))
    return getattr(kv_cache_config, "prefix_cacheable_group_ids", every)


def hash_tokens(kv_cache_config: KVCacheConfig) -> int | None:
    """How many tokens a block hash stands for where groups have blocks of their own sizes. None: not told."""
    return getattr(kv_cache_config, "hash_block_size", None)


def may_sleep(config: VllmConfig) -> bool:
    """Whether the engine may give its device memory away while it lives."""
    return bool(getattr(config.model_config, "enable_sleep_mode", False))


def sleep_follows_reset(config: VllmConfig) -> bool:
    """The engine may sleep, and its workers' connectors are not told: but the scheduler's is, to reset, right before."""
    return may_sleep(config) and not hasattr(base.KVConnectorBase_V1, "unregister_kv_caches")


def event_extra_keys(request: Request, block_tokens: int, first: int, end: int) -> list[Any]:
    """What vLLM's events say beside the tokens of what went into the hashes of blocks [first, end), of each; one None for
    all where nothing did."""
    has_embeds = getattr(request, "prompt_embeds", None) is not None
    if not (request.lora_request or request.cache_salt or getattr(request, "mm_features", None) or has_embeds):
        return [None]
    keys = []
    item = 0
    for block in range(first, end):
        key, item = kv_cache_utils.generate_block_hash_extra_keys(
            request, block * block_tokens, (block + 1) * block_tokens, item
        )
        keys.append(key)
    untag = getattr(kv_cache_utils, "to_event_extra_keys", None)
    return (untag(keys) or keys) if untag is not None else keys
