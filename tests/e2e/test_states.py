"""States on the scheduler side, without an engine: which models are refused, which prefixes are found, what is saved."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from flexkv.integration.vllm.groups import Group, UnsupportedGroups, groups_of
from flexkv.integration.vllm.metadata import LoadOrder
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.states import longest_with_states
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    UniformTypeKVCacheSpecs,
)

BLOCK = 32
FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
STATES = MambaSpec(block_size=BLOCK, shapes=((4, 8),), dtypes=(torch.float32,), mamba_cache_mode="align")
OTHER_STATES = dataclasses.replace(STATES, shapes=((4, 16),))
UNIFORM = UniformTypeKVCacheSpecs(block_size=BLOCK, kv_cache_specs={"layer.1": STATES})


def config(**more: Any) -> Any:
    return SimpleNamespace(
        cache_config=SimpleNamespace(block_size=BLOCK, sliding_window=None, use_replayssm=more.pop("replay", False)),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=more.pop("context", 1), prefill_context_parallel_size=1
        ),
        model_config=None,
        **more,
    )


def described(*specs: KVCacheSpec, hash_tokens: int = BLOCK) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(100, [], groups, hash_block_size=hash_tokens)


@pytest.mark.parametrize("spec", [STATES, UNIFORM], ids=["plain", "uniform"])
def test_groups_of_a_model_with_states(spec: KVCacheSpec) -> None:
    full, states = groups_of(config(), described(FULL, spec))
    assert (full.holds_states, states.holds_states) == (False, True)
    assert (states.block_tokens, states.hashes_per_block, states.window) == (BLOCK, 1, None)
    other = groups_of(config(), described(FULL, OTHER_STATES))[1]
    assert states.fingerprint(b"f") != other.fingerprint(b"f")


FULL_16 = dataclasses.replace(FULL, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("engine", "cache", "why"),
    [
        (config(), described(FULL, dataclasses.replace(STATES, mamba_cache_mode="none")), 'the mode is "none"'),
        (config(speculative_config=object()), described(FULL, STATES), "speculative decoding"),
        (config(replay=True), described(FULL, STATES), "ReplaySSM"),
        (config(context=2), described(FULL, STATES), "context parallelism"),
        (config(), described(FULL, STATES, hash_tokens=16), "prefix_match_unit"),
        (config(), described(STATES), "states only"),
        (config(), described(FULL, FULL_16, STATES), "several precisions"),
    ],
    ids=["mode", "drafts", "replay", "context", "inside of a block", "alone", "precisions"],
)
def test_refused(engine: Any, cache: KVCacheConfig, why: str) -> None:
    with pytest.raises(UnsupportedGroups, match=why):
        groups_of(engine, cache)


def test_an_engine_that_does_not_tell_where_states_are_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr("flexkv.integration.vllm.compat.TELLS_STATES", False)
    with pytest.raises(UnsupportedGroups, match="complete states"):
        groups_of(config(), described(FULL, STATES))


class Client:
    """Of a group with all of a prompt's blocks, or of one with the states after some of them."""

    def __init__(self, kept: int = 0, states: tuple[int, ...] = ()) -> None:
        self.kept = kept
        self.states = {hash_of(number) for number in states}
        self.loads: list[tuple[int, int, list[int]]] = []
        self.saves: list[tuple[list[bytes], int, list[int]]] = []
        self.canceled: list[int] = []
        self.alone: dict[int, bytes] = {}  # the state that a sequence is
        self._sequences = 0

    def open_sequence(self) -> int:
        self._sequences += 1
        return self._sequences

    def close_sequence(self, sequence: int) -> None:
        self.alone.pop(sequence, None)

    def lookup(self, sequence: int, hashes: list[bytes], in_engine: int) -> tuple[int, str, int]:
        return min(self.kept, len(hashes)), "never_seen", 0

    def lookup_last(self, sequence: int, hashes: list[bytes]) -> tuple[int, str, int]:
        self.alone.pop(sequence, None)
        for number in range(len(hashes), 0, -1):
            if hashes[number - 1] in self.states:
                self.alone[sequence] = hashes[number - 1]
                return number, "none", 0
        return 0, "never_seen", 0

    def load(self, sequence: int, first: int, blocks: list[int]) -> int:
        self.loads.append((sequence, first, blocks))
        return 100 + len(self.loads)

    def save(self, sequence: int, hashes: list[bytes], first: int, blocks: list[int]) -> int:
        self.saves.append((list(hashes), first, blocks))
        return len(self.saves)

    def cancel(self, job: int) -> None:
        self.canceled.append(job)

    def take_ended_jobs(self) -> list[tuple[int, str]]:
        return []

    def generation(self) -> int:
        return 0


def hash_of(number: int) -> bytes:
    """Of a prompt's block with this number, from 1."""
    return b"%d" % number


class Scheduling:
    """A request of 8 blocks and 3 tokens."""

    def __init__(self, monkeypatch: Any, *clients: Client) -> None:
        self.clients = clients
        monkeypatch.setattr("flexkv.integration.vllm.scheduler.open_clients", lambda *_: (list(clients), None, None))
        settings: Any = SimpleNamespace(
            sync_load_max_bytes=1 << 40,
            min_load_tokens=0,
            save_timeout_ms=100,
            kv_events=False,
            reaches_beyond_memory=False,
        )
        groups = groups_of(config(), described(FULL, *[STATES] * (len(clients) - 1)))
        self.side = SchedulerSide(config(), settings, groups)
        self.request: Any = SimpleNamespace(
            request_id="r",
            kv_transfer_params=None,
            block_hashes=[hash_of(number) for number in range(1, 9)],
            num_tokens=8 * BLOCK + 3,
            num_preemptions=0,
        )

    def step(
        self,
        states: list[tuple[int, int, int]],
        tables: tuple[list[int], ...] = ([], []),
        name: str = "r",
        **more: Any,
    ) -> Any:
        """`states`: (group, block, tokens) that are complete after it."""
        new = SimpleNamespace(req_id=name, num_computed_tokens=0, block_ids=tables)
        none = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
        output: Any = SimpleNamespace(
            scheduled_new_reqs=[new],
            scheduled_cached_reqs=none,
            num_scheduled_tokens={name: 1},
            total_num_scheduled_tokens=1,
            kv_connector_block_state=SimpleNamespace(boundary_state_offloads={"r": states}),
            **more,
        )
        return self.side.build_connector_meta(output)


# Blocks that attention has, states that there are, blocks in the engine, blocks to be loaded.
@pytest.mark.parametrize(
    ("kept", "states", "local", "loaded"),
    [
        (8, (8,), 0, 8),
        (8, (3, 5), 0, 5),
        (4, (3, 5), 0, 3),
        (8, (), 0, 0),
        (8, (3,), 3, 0),
        (8, (3, 6), 3, 3),
        (0, (3,), 0, 0),
    ],
)
def test_a_hit_ends_where_there_is_a_state(
    monkeypatch: Any, kept: int, states: tuple[int, ...], local: int, loaded: int
) -> None:
    run = Scheduling(monkeypatch, Client(kept), Client(states=states))
    found = run.side.get_num_new_matched_tokens(run.request, local * BLOCK)
    assert found == (loaded * BLOCK, loaded > 0)


def test_the_last_token_is_always_computed(monkeypatch: Any) -> None:
    run = Scheduling(monkeypatch, Client(8), Client(states=(7, 8)))
    run.request.num_tokens = 8 * BLOCK
    assert run.side.get_num_new_matched_tokens(run.request, 0) == (7 * BLOCK, True)


@pytest.mark.parametrize(
    ("one", "other", "end"),
    [((2, 5, 7), (2, 6), 2), ((2, 5), (5, 7), 5), ((3,), (4,), 0), ((), (4,), 0)],
)
def test_all_groups_of_states_need_one_after_the_same_token(
    one: tuple[int, ...], other: tuple[int, ...], end: int
) -> None:
    groups = groups_of(config(), described(FULL, STATES, STATES))[1:]
    clients = [Client(states=one), Client(states=other)]
    chains = [SimpleNamespace(sequence=client.open_sequence()) for client in clients]
    parts: Any = list(zip(groups, clients, chains, strict=True))
    hashes = [hash_of(number) for number in range(1, 9)]
    assert longest_with_states(parts, hashes, 0, 8 * BLOCK, BLOCK) == (end * BLOCK, False)
    if end:
        assert [client.alone for client in clients] == [{1: hash_of(end)}] * 2


def test_of_states_only_the_last_one_is_loaded(monkeypatch: Any) -> None:
    run = Scheduling(monkeypatch, Client(8), Client(states=(6,)))
    run.side.get_num_new_matched_tokens(run.request, 2 * BLOCK)
    tables = ([1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 16])
    run.side.update_state_after_alloc(run.request, SimpleNamespace(get_block_ids=lambda: tables), 4 * BLOCK)
    assert run.clients[0].loads == [(1, 2, [3, 4, 5, 6])]
    assert run.clients[1].loads == [(1, 0, [16])]
    (order,) = run.step([]).loads
    assert order == LoadOrder("r", False, [3, 4, 5, 6, 16], [(0, 101), (1, 101)], complete=True)


def test_a_load_without_room_for_the_state_fails(monkeypatch: Any) -> None:
    run = Scheduling(monkeypatch, Client(8), Client(states=(6,)))
    run.side.get_num_new_matched_tokens(run.request, 0)
    tables = ([1, 2, 3, 4, 5, 6], [0] * 6)
    run.side.update_state_after_alloc(run.request, SimpleNamespace(get_block_ids=lambda: tables), 6 * BLOCK)
    (order,) = run.step([]).loads
    assert not order.complete
    assert run.clients[1].loads == []


def test_a_state_is_saved_alone_under_the_hash_of_the_block_that_it_ends(monkeypatch: Any) -> None:
    run = Scheduling(monkeypatch, Client(), Client())
    run.side.get_num_new_matched_tokens(run.request, 0)
    meta = run.step([(1, 7, 3 * BLOCK), (1, 9, 5 * BLOCK)])
    assert run.clients[1].saves == [([hash_of(3)], 0, [7]), ([hash_of(5)], 0, [9])]
    assert meta.saves == [(1, 1), (1, 2)]


@pytest.mark.parametrize(
    "state",
    [(1, 7, 3 * BLOCK + 16), (1, 0, 3 * BLOCK), (1, 7, 9 * BLOCK)],
    ids=["inside of a block", "no memory", "tokens that are not certain"],
)
def test_states_that_are_not_saved(monkeypatch: Any, state: tuple[int, int, int]) -> None:
    run = Scheduling(monkeypatch, Client(), Client())
    run.side.get_num_new_matched_tokens(run.request, 0)
    assert run.step([state]).saves == []


def test_what_a_request_computed_before_a_reset_or_has_given_away_is_not_saved(monkeypatch: Any) -> None:
    run = Scheduling(monkeypatch, Client(), Client())
    run.side.get_num_new_matched_tokens(run.request, 0)
    assert run.step([(1, 7, BLOCK)], name="another").saves == [], "preempted in this step"
    for client in run.clients:
        client.reset = lambda: None
    run.side.reset_cache()
    assert run.step([(1, 7, BLOCK)]).saves == []


def test_the_step_that_overwrites_a_state_calls_its_save_off(monkeypatch: Any) -> None:
    run = Scheduling(monkeypatch, Client(), Client())
    run.side.get_num_new_matched_tokens(run.request, 0)
    run.step([(1, 7, BLOCK)])
    run.step([], ([7], [20]), "another")
    assert [client.canceled for client in run.clients] == [[], [1]]


# Also where no request has the block any more.
@pytest.mark.parametrize(
    "more",
    [{"new_block_ids_to_zero": [3, 7]}, {"kv_cache_block_copies": [SimpleNamespace(src_block_id=3, dst_block_id=7)]}],
    ids=["zeroed", "copied to"],
)
def test_what_a_step_overwrites_besides_calls_a_save_off(monkeypatch: Any, more: dict[str, Any]) -> None:
    run = Scheduling(monkeypatch, Client(), Client())
    run.side.get_num_new_matched_tokens(run.request, 0)
    run.step([(1, 7, BLOCK)])
    run.step([], **more)
    assert [client.canceled for client in run.clients] == [[], [1]]


def test_blocks_of_states_count_from_the_start_of_the_prompt() -> None:
    group = Group(1, 2, BLOCK, 1, None, None, "", True)
    assert group.to_load([0, 0, 5], 0, 3) == [(0, [5])]
    assert group.to_load([0, 4, 0, 5, 6], 1, 4) == [(0, [5])]
    assert group.to_load([0, 0, 0], 0, 3) == []
