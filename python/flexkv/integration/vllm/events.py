"""KV events of the cache, for routers that listen to the engine: vLLM's own, with medium CPU or DISK.

The node knows blocks by keys. What events need beside them it is told here: of each block before it is saved, and of
those that a lookup finds and nobody has described, as after a restart (docs/decisions/0018)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

from flexkv.integration.vllm import compat
from flexkv.kv_events import Details, Stored, fields_of, low_64_bits, pack_details, records

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.request import Request

    from flexkv.config import Settings
    from flexkv.integration.vllm.groups import Group
    from flexkv.integration.vllm.tracked import Chain

# What vLLM publishes of a hash. Its own function looks at its settings for each one, which takes ten times as long as the rest.
_published = low_64_bits if isinstance(maybe_convert_block_hash(BlockHash(bytes(32))), int) else bytes
_KNOWN_FIELDS = {cls: frozenset(cls.__struct_fields__) for cls in (BlockStored, BlockRemoved)}


def wanted(config: VllmConfig, settings: Settings) -> bool:
    events = getattr(config, "kv_events_config", None)
    return settings.kv_events and events is not None and events.enable_kv_cache_events


def describe(client: Any, group: Group, chain: Chain, request: Request, first: int, end: int) -> None:
    """Tells the node what the engine calls blocks [first, end) of a request."""
    size = group.block_tokens
    tokens = request.all_token_ids[first * size : end * size]
    lora = request.lora_request
    details = [
        pack_details(Details(lora and lora.adapter_id, lora and lora.name, group.index, keys))
        for keys in compat.event_extra_keys(request, size, first, end)
    ]
    client.describe(chain.sequence, first, group.hashes(request.block_hashes)[:end], tokens, details)


def describe_found(client: Any, group: Group, chain: Chain, request: Request, matched: int) -> None:
    """The same for those of `matched` leading blocks that nobody has described."""
    first = client.first_undescribed(chain.sequence)
    if first < matched:
        describe(client, group, chain, request, first, matched)


def engine_clears(pool: Any) -> bool:
    """Whether vLLM is about to say that all blocks are cleared. `pool`: its block pool."""
    return any(isinstance(event, AllBlocksCleared) for event in pool.kv_event_queue)


def take(clients: list[Any], cleared: bool) -> list[KVCacheEvent]:
    """What has changed. `cleared`: routers have just heard from vLLM that all is, and may have forgotten ours with it;
    they hear all of it again."""
    found: list[KVCacheEvent] = []
    for client in clients:
        changes = client.take_changes()
        if cleared:
            changes = [change for change in changes if change[0] == "removed"] + client.told()
        found += map(_event, records(changes))
    return found


def _event(record: Any) -> KVCacheEvent:
    cls = BlockStored if isinstance(record, Stored) else BlockRemoved
    fields = fields_of(record, _published)
    return cls(**{name: value for name, value in fields.items() if name in _KNOWN_FIELDS[cls]})
