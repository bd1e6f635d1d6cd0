"""KV events of the cache, for routers that listen to the engine: vLLM's own, with medium CPU or DISK.

The node knows blocks by keys. What events need beside them it is told here: of each block before it is saved, and of
those that a lookup finds and nobody has described, as after a restart (docs/decisions/0018)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from flexkv.integration.vllm import compat
from flexkv.kv_events import Details, Stored, fields_of, pack_details, records

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.request import Request

    from flexkv.config import Settings
    from flexkv.integration.vllm.groups import Group
    from flexkv.integration.vllm.tracked import Chain

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


def take(clients: list[Any]) -> list[KVCacheEvent]:
    return [_event(record) for client in clients for record in records(client.take_changes())]


def _event(record: Any) -> KVCacheEvent:
    cls = BlockStored if isinstance(record, Stored) else BlockRemoved
    fields = fields_of(record, maybe_convert_block_hash)
    return cls(**{name: value for name, value in fields.items() if name in _KNOWN_FIELDS[cls]})
