"""The KV cache groups of a model: layers that share a block table. With one kind of attention there is one group; hybrid
models have several. To the node each group is an engine of its own (docs/decisions/0006)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.v1 import kv_cache_interface as specs

from flexkv.integration.vllm import compat

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

# vLLM gives it to positions that need no memory: neither saved nor loaded.
NULL_BLOCK = 0
# A space of the node takes up to a 16th of the pool at a time: with more groups some would find no room at all.
_GROUPS_MAX = 12
# By exact type: what derives from these keeps other blocks than they do.
_KEEPS_ALL = (specs.FullAttentionSpec, specs.MLAAttentionSpec)
_KEEPS_WINDOW = (specs.SlidingWindowSpec, specs.ChunkedLocalAttentionSpec)
_KEEPS_STATES = (specs.MambaSpec,)
_KEEPS_TAILS = tuple(kind for kind in (getattr(specs, "SlidingWindowMLASpec", None),) if kind is not None)


# Of a load that failed vLLM computes from the first block on that is named, whose window lies in blocks that nobody loaded.
_ONLY_WINDOWS = "all its attention is windowed, and vLLM cannot be told that a load has failed as a whole"
_TAKE_OURS = (
    'Take "kv_connector": "FlexKVConnector", "kv_connector_module_path": "flexkv.integration.vllm.connector".'
)


class UnsupportedGroups(Exception):
    """The model has a KV cache group that cannot be kept; says which and why."""


@dataclass(frozen=True)
class Group:
    index: int
    count: int  # of all groups
    block_tokens: int
    hashes_per_block: int
    # Tokens back from the next one whose blocks the engine keeps for sure; None: all. 1 is never too much.
    window: int | None
    # None: the layers of all tensors that the engine registers.
    layer_names: frozenset[str] | None
    description: str = ""
    # A block holds no KV of its tokens, but the state after the last of them (docs/decisions/0026): it needs none of the
    # blocks before it, of which most do not exist.
    holds_states: bool = False
    # Of a window over latents only what a prefix needs that ends at a boundary is kept: the last so many blocks before
    # it, by themselves (docs/decisions/0031); 0: this group is kept otherwise. A boundary comes every so many blocks.
    tail_blocks: int = 0
    boundary_blocks: int = 0

    @property
    def at_boundaries(self) -> bool:
        """Kept at some ends of prefixes only, each by itself, and not as one chain from the first block on."""
        return self.holds_states or self.tail_blocks > 0

    def engine_id(self, engine_id: str) -> str:
        return engine_id if self.count == 1 else f"{engine_id}/group-{self.index}"

    def model_name(self, model: str) -> str:
        return model if self.count == 1 else f"{model} (KV group {self.index + 1} of {self.count})"

    def fingerprint(self, fingerprint: bytes) -> bytes:
        if self.count == 1:
            return fingerprint
        return hashlib.sha256(fingerprint + f"{self.index} of {self.count}: {self.description}".encode()).digest()

    def layers_of(self, kv_caches: dict[str, Any]) -> dict[str, Any]:
        names = self.layer_names
        return kv_caches if names is None else {name: kv_caches[name] for name in kv_caches if name in names}

    def hashes(self, block_hashes: list[bytes]) -> list[bytes]:
        """One for each of this group's blocks: a chained hash stands for all that precedes its end."""
        step = self.hashes_per_block
        return block_hashes if step == 1 else block_hashes[step - 1 :: step]

    def first_live(self, computed_tokens: int) -> int:
        """The first block that the engine has not given back before a step that begins with so many tokens computed."""
        return 0 if self.window is None else max(computed_tokens - self.window + 1, 0) // self.block_tokens

    def to_load(self, block_ids: list[int], first: int, end: int) -> list[tuple[int, list[int]]]:
        """Of a request's blocks [first, end) of `block_ids`, those to be filled: (position in what was looked up, ids) of
        each run. Of states only the last one is wanted, and was looked up alone; of windows over latents the tail."""
        if self.tail_blocks:
            tail = block_ids[end - self.tail_blocks : end]
            return [] if NULL_BLOCK in tail else [(0, tail[::-1])]
        return self.runs(block_ids[end - 1 : end], 0) if self.holds_states else self.runs(block_ids[first:end], first)

    def tail_hashes(self, block_hashes: list[bytes], end: int) -> list[bytes]:
        """Of the blocks before a boundary, the last one first: the tail is found by it, and it is evicted last."""
        step = self.hashes_per_block
        return [block_hashes[number * step - 1] for number in range(end, end - self.tail_blocks, -1)]

    def runs(self, block_ids: list[int], first: int) -> list[tuple[int, list[int]]]:
        """(position, ids) of each run of blocks that are not null; `first` is the position of the first id."""
        if NULL_BLOCK not in block_ids:
            return [(first, block_ids)] if block_ids else []
        found: list[tuple[int, list[int]]] = []
        run: list[int] = []
        for position, block in enumerate(block_ids, start=first):
            if block == NULL_BLOCK:
                run = []
                continue
            if not run:
                found.append((position, run))
            run.append(block)
        return found


def groups_of(config: VllmConfig, kv_cache_config: KVCacheConfig | None) -> list[Group]:
    """`kv_cache_config`: None where the engine does not tell; then there is one group. Raises UnsupportedGroups."""
    # Attention to later tokens, or a result made of all tokens (mean pooling): vLLM reuses no prefix then, nor may we.
    if not getattr(config.model_config, "is_prefix_caching_supported", True):
        raise UnsupportedGroups("its prompts have to be computed whole (vLLM supports no prefix caching for it)")
    if getattr(config.model_config, "rswa_window", None):
        raise UnsupportedGroups("windows that begin behind the prompt (R-SWA) are not supported")
    described = kv_cache_config.kv_cache_groups if kv_cache_config is not None else []
    if kv_cache_config is None or not described:
        if config.cache_config.sliding_window is not None:
            raise UnsupportedGroups(f"{_ONLY_WINDOWS} through vLLM's own FlexKVConnectorV1. {_TAKE_OURS}")
        return [Group(0, 1, _block_tokens(config), 1, None, None)]
    states = [group for group in described if _holds_states(group.kv_cache_spec)]
    # What is a reason to zero blocks, besides states.
    tails = [group for group in described if _keeps_tails(group.kv_cache_spec)]
    if getattr(kv_cache_config, "has_mixed_precision_kv_cache", _zeroes(kv_cache_config) and not states) and not tails:
        raise UnsupportedGroups("a KV cache of several precisions is not supported")
    for index, group in enumerate(described):
        _check(index, group, kv_cache_config)
    if states:
        _check_states(config, states, len(described))
    if tails:
        _check_tails(config, described)
    if len(described) == 1:
        window = _window(described[0].kv_cache_spec)
        if window is not None and compat.TransferResults is None:
            raise UnsupportedGroups(f"{_ONLY_WINDOWS} in this version")
        return [Group(0, 1, _block_tokens(config), 1, window, None)]
    if len(described) > _GROUPS_MAX:
        raise UnsupportedGroups(f"{len(described)} KV cache groups; at most {_GROUPS_MAX} are supported")
    if compat.TransferResults is None:
        raise UnsupportedGroups("several KV cache groups: this vLLM cannot be told which request's load has failed")
    if _context_ranks(config) > 1:
        raise UnsupportedGroups("several KV cache groups together with context parallelism are not supported")
    return _with_boundaries([_group(index, group, kv_cache_config) for index, group in enumerate(described)])


def alignment_tokens(groups: list[Group]) -> int:
    """Every prefix that is served is a multiple of this long."""
    return math.lcm(*(group.block_tokens for group in groups))


def _block_tokens(config: VllmConfig) -> int:
    """Of the only group."""
    return int(config.cache_config.block_size) * _context_ranks(config)


def _context_ranks(config: VllmConfig) -> int:
    parallel = config.parallel_config
    decode = getattr(parallel, "decode_context_parallel_size", 1)
    return int(decode * getattr(parallel, "prefill_context_parallel_size", 1))


def _zeroes(kv_cache_config: KVCacheConfig) -> bool:
    return bool(getattr(kv_cache_config, "needs_kv_cache_zeroing", False))


def _holds_states(spec: Any) -> bool:
    return any(type(layer) in _KEEPS_STATES for layer in _layer_specs(spec))


def _keeps_tails(spec: Any) -> bool:
    return any(type(layer) in _KEEPS_TAILS for layer in _layer_specs(spec))


def _check_states(config: VllmConfig, groups: list[KVCacheGroupSpec], group_count: int) -> None:
    modes = {layer.mamba_cache_mode for group in groups for layer in _layer_specs(group.kv_cache_spec)}
    if modes != {"align"}:
        mode = ", ".join(sorted(modes))
        raise UnsupportedGroups(f'states are kept only with prefix caching, and in mode "align"; here the mode is "{mode}"')
    if not compat.TELLS_STATES:
        raise UnsupportedGroups("this vLLM does not tell which blocks hold complete states")
    # A draft that is rejected leaves a state behind that is taken back from other blocks.
    if getattr(config, "speculative_config", None) is not None:
        raise UnsupportedGroups("states together with speculative decoding are not supported")
    if getattr(config.cache_config, "use_replayssm", False):
        raise UnsupportedGroups("states of which a part is kept elsewhere (ReplaySSM) are not supported")
    if len(groups) == group_count:
        raise UnsupportedGroups("models with states only are not supported: no attention says how far a prompt is kept")


def _check_tails(config: VllmConfig, groups: list[KVCacheGroupSpec]) -> None:
    if len({_keeps_tails(group.kv_cache_spec) for group in groups}) == 1:
        raise UnsupportedGroups("models with windows over latents only are not supported")
    # Their caches are of several precisions, for which vLLM zeroes blocks that it hands out.
    if not compat.LEAVES_LOADED_BLOCKS:
        raise UnsupportedGroups("windows over latents: this vLLM zeroes blocks that are being loaded")
    # Drafts that are rejected have been written over what the window's state was made of.
    if getattr(config, "speculative_config", None) is not None:
        raise UnsupportedGroups("windows over latents together with speculative decoding are not supported")


def _with_boundaries(groups: list[Group]) -> list[Group]:
    alignment = alignment_tokens(groups)
    for group in groups:
        if group.tail_blocks * group.block_tokens > alignment:
            raise UnsupportedGroups(
                f"KV cache group {group.index} needs {group.tail_blocks * group.block_tokens} tokens before the end of a "
                f"prefix, and prefixes end every {alignment} tokens"
            )
    return [replace(group, boundary_blocks=alignment // group.block_tokens) for group in groups]


def _check(index: int, group: KVCacheGroupSpec, kv_cache_config: KVCacheConfig) -> None:
    kinds = {type(layer) for layer in _layer_specs(group.kv_cache_spec)}
    known = any(kinds <= {*those} for those in ((*_KEEPS_ALL, *_KEEPS_WINDOW), _KEEPS_STATES, _KEEPS_TAILS))
    if not known or index not in compat.prefix_cacheable(kv_cache_config):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UnsupportedGroups(f"KV cache group {index} holds other than full or windowed attention or states ({names})")


def _group(index: int, group: KVCacheGroupSpec, kv_cache_config: KVCacheConfig) -> Group:
    spec = group.kv_cache_spec
    hash_tokens = compat.hash_tokens(kv_cache_config)
    if not hash_tokens:
        raise UnsupportedGroups("several KV cache groups: this vLLM does not tell over how many tokens a block hash goes")
    if spec.block_size % hash_tokens != 0:
        raise UnsupportedGroups(
            f"KV cache group {index} has blocks of {spec.block_size} tokens, block hashes are over {hash_tokens}"
        )
    holds_states = _holds_states(spec)
    if holds_states and spec.block_size != hash_tokens:
        raise UnsupportedGroups(
            f"prefixes that end inside of a block of states ({hash_tokens} of {spec.block_size} tokens: prefix_match_unit)"
        )
    window = None if holds_states else _window(spec)
    return Group(
        index,
        len(kv_cache_config.kv_cache_groups),
        spec.block_size,
        spec.block_size // hash_tokens,
        window,
        frozenset(group.layer_names),
        f"{spec} {sorted(group.layer_names)}",
        holds_states,
        math.ceil((window - 1) / spec.block_size) if window is not None and _keeps_tails(spec) else 0,
    )


def _layer_specs(spec: Any) -> list[Any]:
    return list(spec.kv_cache_specs.values()) if isinstance(spec, specs.UniformTypeKVCacheSpecs) else [spec]


def _window(spec: Any) -> int | None:
    layers = _layer_specs(spec)
    if all(type(layer) in _KEEPS_ALL for layer in layers):
        return None
    if all(type(layer) in (specs.SlidingWindowSpec, *_KEEPS_TAILS) for layer in layers):
        return min(int(layer.sliding_window) for layer in layers)
    return 1
