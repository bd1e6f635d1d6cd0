"""States: what layers keep of all tokens so far instead of KV of each (Mamba, linear attention, short convolutions). Which
prefixes are kept with them (docs/decisions/0026)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexkv.integration.vllm.groups import Group
    from flexkv.integration.vllm.tracked import Chain


def longest_with_states(
    parts: list[tuple[Group, Any, Chain]], block_hashes: list[bytes], begin: int, end: int, alignment: int
) -> tuple[int, bool]:
    """The longest prefix of more than `begin` and at most `end` tokens after which all groups of states (`parts`: each with
    its client and chain) have one, and whether one of them is on drives only; or `begin`. Multiples of `alignment`, which is
    one of their blocks. The sequence of each chain is that state then, a chain of one block."""
    while end > begin:
        reached = end
        on_drives = False
        for group, client, chain in parts:
            first = begin // group.block_tokens
            # A block's hash goes over all tokens up to its end, and so names the state after them.
            hashes = group.hashes(block_hashes)[first : end // group.block_tokens]
            number, _, disk_blocks = client.lookup_last(chain.sequence, hashes)
            reached = min(reached, (first + number) * group.block_tokens // alignment * alignment)
            on_drives = on_drives or disk_blocks > 0
        if reached == end:
            return end, on_drives
        end = reached
    return begin, False
