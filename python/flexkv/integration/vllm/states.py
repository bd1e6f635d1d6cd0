"""What is kept only at some ends of prefixes: states, which layers keep of all tokens so far instead of KV of each
(Mamba, linear attention, short convolutions; docs/decisions/0026), and tails of windows over latents (0031). Which
prefixes are kept with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexkv.integration.vllm.groups import Group
    from flexkv.integration.vllm.tracked import Chain


def longest_with_states(
    parts: list[tuple[Group, Any, Chain]], block_hashes: list[bytes], begin: int, end: int, alignment: int
) -> tuple[int, bool]:
    """The longest prefix of more than `begin` and at most `end` tokens after which all groups of states and tails
    (`parts`: each with its client and chain) have one, and whether one of them is on drives only; or `begin`. Multiples
    of `alignment`, which is one block of states. The sequence of each chain is that state then, a chain of one block, or
    that tail."""
    while end > begin:
        reached = end
        on_drives = False
        for group, client, chain in parts:
            if group.tail_blocks:
                tokens, from_drives = _longest_with_tail(group, client, chain, block_hashes, begin, end)
                reached, on_drives = min(reached, tokens), on_drives or from_drives
                continue
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


def _longest_with_tail(
    group: Group, client: Any, chain: Chain, block_hashes: list[bytes], begin: int, end: int
) -> tuple[int, bool]:
    """The same of one group of tails."""
    step = group.boundary_blocks

    def kept(number: int) -> tuple[bool, int]:
        found, _, disk_blocks = client.lookup(chain.sequence, group.tail_hashes(block_hashes, number), 0)
        return found == group.tail_blocks, disk_blocks

    if chain.tail_asked == (begin, end):  # asked again while the request waits, which must cost little
        whole, disk_blocks = kept(chain.tail_end)
        if whole:
            return chain.tail_end * group.block_tokens, disk_blocks > 0
        chain.tail_asked = (0, 0)
    # A tail that reached into what the engine has itself would be loaded over blocks that others use.
    first = (begin // group.block_tokens + group.tail_blocks + step - 1) // step * step
    boundaries = range(first, end // group.block_tokens + 1, step)
    while boundaries:
        heads = [block_hashes[number * group.hashes_per_block - 1] for number in boundaries]
        found, _, _ = client.lookup_last(chain.heads, heads)
        if found == 0:
            break
        number = boundaries[found - 1]
        client.close_sequence(chain.sequence)
        chain.sequence, chain.tail_end = client.open_sequence(), number
        whole, disk_blocks = kept(number)
        if whole:
            chain.tail_asked = (begin, end)
            return number * group.block_tokens, disk_blocks > 0
        boundaries = boundaries[: found - 1]
    return begin, False
