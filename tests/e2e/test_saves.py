"""Which saves are canceled before a step overwrites what they read, and when refused ones are offered again, without an
engine."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flexkv.integration.common.saves import Job, Offers, RunningSaves, Save
from flexkv.integration.vllm import compat, identity
from flexkv.integration.vllm.groups import Group
from flexkv.integration.vllm.metadata import FlexKVMetadata
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.tracked import Tracked

BLOCK = 32


def readers(saves: RunningSaves, *block_ids: int) -> set[Job]:
    found: set[Job] = set()
    saves.add_readers(list(block_ids), found)
    return found


def test_a_block_read_by_two_saves_is_known_until_both_have_ended() -> None:
    saves = RunningSaves()
    saves.add((0, 1), Save(Offers(), 0, [7]))
    saves.add((0, 2), Save(Offers(), 0, [7, 8]))
    saves.add((1, 2), Save(Offers(), 0, [8, 10]))  # another group's: a block changes hands
    assert readers(saves, 7, 9) == {(0, 1), (0, 2)}
    assert readers(saves, 8) == {(0, 2), (1, 2)}
    saves.end((0, 2))
    assert readers(saves, 7, 9) == {(0, 1)}
    assert readers(saves, 8) == {(1, 2)}
    saves.end((1, 2))
    saves.end((0, 1))
    assert readers(saves, 7, 8, 9, 10) == set()
    assert len(saves) == 0


class FakeClient:
    """Takes every save; the test says how they end."""

    def __init__(self) -> None:
        self.ended: list[tuple[int, str]] = []
        self.connection = 1
        self.saves: list[tuple[int, int]] = []  # first block, blocks
        self.canceled: list[int] = []
        self.waits = 0
        self.slow = False

    def open_sequence(self) -> int:
        return 1

    def lookup(self, sequence: int, hashes: list[bytes], in_engine: int) -> tuple[int, str, int]:
        return 0, "never_seen", 0

    def save(self, sequence: int, hashes: list[bytes], first: int, blocks: list[int]) -> int:
        if self.connection == 0:
            return 0
        self.saves.append((first, len(blocks)))
        return len(self.saves)

    def cancel(self, job: int) -> None:
        self.canceled.append(job)

    def take_ended_jobs(self) -> list[tuple[int, str]]:
        ended, self.ended = self.ended, []
        return ended

    def generation(self) -> int:
        return self.connection

    def observe_step(self, *step: Any) -> None:
        pass

    def close_sequence(self, sequence: int) -> None:
        pass

    def reset(self) -> None:
        pass

    def wait_ended_jobs(self, timeout_s: float) -> bool:
        """All that was canceled ends, or, should the node be slow, so much time passes."""
        self.waits += 1
        if self.slow:
            time.sleep(timeout_s)
        self.ended = [] if self.slow else [(job, "canceled") for job in self.canceled]
        return bool(self.ended)


class Decoding:
    """One request that computes a block in each step, in front of the scheduler side."""

    def __init__(
        self, monkeypatch: Any, sleep_mode: bool = False, speculates: bool = False, resumable: bool = False
    ) -> None:
        self.client = FakeClient()
        monkeypatch.setattr("flexkv.integration.vllm.scheduler.open_clients", lambda *_: ([self.client], None, None))
        config: Any = SimpleNamespace(
            model_config=SimpleNamespace(enable_sleep_mode=sleep_mode), speculative_config=speculates or None
        )
        settings: Any = SimpleNamespace(
            sync_load_max_bytes=0,
            min_load_tokens=0,
            save_timeout_ms=100,
            kv_events=False,
            reaches_beyond_memory=False,
        )
        self.side = SchedulerSide(config, settings, [Group(0, 1, BLOCK, 1, None, None)])
        self.blocks = 0
        self.request: Any = SimpleNamespace(
            request_id="r",
            kv_transfer_params=None,
            block_hashes=[],
            num_tokens=0,
            num_preemptions=0,
            resumable=resumable,
        )
        self.side.get_num_new_matched_tokens(self.request, 0)

    def step(self, block: int | None = None) -> FlexKVMetadata:
        """`block`: the one that the engine gives the request for what it computes now."""
        self.blocks += 1
        self.request.block_hashes.append(b"%d" % self.blocks)
        cached = SimpleNamespace(
            req_ids=["r"],
            resumed_req_ids=set(),
            new_block_ids=[([self.blocks if block is None else block],)],
            num_computed_tokens=[(self.blocks - 1) * BLOCK],
        )
        output: Any = SimpleNamespace(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={"r": BLOCK},
            total_num_scheduled_tokens=BLOCK,
        )
        return self.side.build_connector_meta(output)


def test_a_block_that_only_drafts_complete_is_not_saved(monkeypatch: Any) -> None:
    run = Decoding(monkeypatch, speculates=True)
    run.request.block_hashes.append(b"1")  # of the confirmed tokens
    cached = SimpleNamespace(
        req_ids=["r"], resumed_req_ids=set(), new_block_ids=[([1, 2],)], num_computed_tokens=[BLOCK - 1]
    )
    output: Any = SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={"r": 1 + BLOCK},
        total_num_scheduled_tokens=1 + BLOCK,
    )
    run.side.build_connector_meta(output)
    assert run.client.saves == [(0, 1)]


@pytest.mark.parametrize(
    ("speculates", "resumable", "saves"), [(False, False, 1), (True, False, 1), (False, True, 1), (True, True, 0)]
)
def test_sessions_with_drafts_are_not_saved(monkeypatch: Any, speculates: bool, resumable: bool, saves: int) -> None:
    run = Decoding(monkeypatch, speculates=speculates, resumable=resumable)
    assert len(run.step().saves) == saves


def test_what_was_refused_is_offered_again_but_ever_less_often(monkeypatch: Any) -> None:
    run = Decoding(monkeypatch)
    run.step()
    run.client.ended = [(1, "pool_full")]
    run.step()
    assert run.client.saves == [(0, 1)]  # not in the very step that heard of it
    run.step()
    assert run.client.saves == [(0, 1), (0, 3)]
    for _ in range(60):  # and refused whenever it is offered
        run.client.ended = [(len(run.client.saves), "pool_full")]
        run.step()
    assert 4 < len(run.client.saves) < 12
    assert all(first == 0 for first, _ in run.client.saves)
    while run.client.saves[-1][1] != run.blocks:
        run.step()
    run.client.ended = [(len(run.client.saves), "")]
    run.step()
    assert run.client.saves[-1] == (run.blocks - 1, 1)


def test_a_save_whose_prefix_is_not_kept_is_offered_with_it(monkeypatch: Any) -> None:
    run = Decoding(monkeypatch)
    run.step()
    run.client.ended = [(1, "")]
    run.step()
    run.client.ended = [(2, "parent_missing")]
    run.step()
    run.step()
    assert run.client.saves == [(0, 1), (1, 1), (0, 4)]


def test_saves_of_a_lost_node_are_canceled_once_and_forgotten(monkeypatch: Any) -> None:
    run = Decoding(monkeypatch)
    run.step()
    run.client.connection = 0
    run.step()
    assert run.client.canceled == [1]
    run.step()
    run.client.connection = 2
    while run.client.saves == [(0, 1)]:
        run.step()
    assert run.client.canceled == [1]
    assert run.client.saves[-1] == (0, run.blocks)  # the new node has none of them


def test_a_save_is_canceled_before_the_step_that_overwrites_its_block(monkeypatch: Any) -> None:
    run = Decoding(monkeypatch)
    run.step()
    run.step(block=7)
    assert run.client.canceled == []
    run.step(block=1)  # what the first save may still read
    assert run.client.canceled == [1]
    assert run.client.saves == [(0, 1), (1, 1)]  # and all is offered anew in a later step, if it is still there
    run.step()
    run.step()
    assert run.client.canceled == [1]
    assert run.client.saves[2][0] == 0


def test_a_save_is_canceled_before_another_connector_loads_into_its_block(monkeypatch: Any) -> None:
    """Under vLLM's MultiConnector the request may be parked meanwhile, and counts as computed when it is scheduled."""
    run = Decoding(monkeypatch)
    run.step()
    run.step()
    parked: Any = SimpleNamespace(
        request_id="parked", kv_transfer_params=None, block_hashes=[], num_tokens=3 * BLOCK, num_preemptions=0
    )
    run.side.get_num_new_matched_tokens(parked, BLOCK)
    # The first block is the engine's own, of its prefix cache; what the second save reads is loaded into.
    run.side.update_state_after_alloc(parked, SimpleNamespace(get_block_ids=lambda: ([1, 2, 9],)), 0)
    run.step()
    assert run.client.canceled == [2]


def test_an_adapter_that_was_trained_anew_finds_nothing_of_the_old_one(monkeypatch: Any, tmp_path: Path) -> None:
    """vLLM hashes its name and path only, which is enough as long as its own cache ends with its process."""
    lora = SimpleNamespace(lora_name="a", lora_int_id=1, lora_path=str(tmp_path))
    plain: Any = SimpleNamespace(block_hashes=[b"1", b"2"], num_preemptions=0)
    adapted: Any = SimpleNamespace(block_hashes=[b"1"], num_preemptions=0, lora_request=lora)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"old")
    identity._stamp_at_load.cache_clear()
    before = Tracked(adapted, [], True).block_hashes().copy()
    assert Tracked(plain, [], True).block_hashes() == [b"1", b"2"]
    assert before != [b"1"]

    (tmp_path / "adapter_model.safetensors").write_bytes(b"newer")
    again = Tracked(adapted, [], True)
    assert again.block_hashes() == before  # what this engine has loaded is what it was
    adapted.block_hashes.append(b"2")
    assert again.block_hashes()[:1] == before
    assert len(again.block_hashes()) == 2
    identity._stamp_at_load.cache_clear()  # as after a restart
    assert Tracked(adapted, [], True).block_hashes()[0] != before[0]


def test_what_rests_on_a_failed_load_is_not_saved(monkeypatch: Any) -> None:
    """vLLM has only the first request that shares a block compute it again, which an abort may keep it from."""
    run = Decoding(monkeypatch)
    run.step()
    run.client.ended = [(1, "")]
    run.step()
    assert run.client.saves == [(0, 1), (1, 1)]
    run.side.update_connector_output(SimpleNamespace(invalid_block_ids={2}))
    assert run.client.canceled == [2]
    for _ in range(20):
        assert run.step().saves == []
    # Another request finds them in the engine's cache.
    hashes = [b"%d" % (i + 1) for i in range(22)]
    other: Any = SimpleNamespace(
        request_id="s", kv_transfer_params=None, block_hashes=hashes, num_tokens=23 * BLOCK, num_preemptions=0
    )

    def begin(block_ids: list[int], computed: int) -> FlexKVMetadata:
        run.side.get_num_new_matched_tokens(other, computed)
        new = SimpleNamespace(req_id="s", block_ids=(block_ids,), num_computed_tokens=computed)
        nothing = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
        output: Any = SimpleNamespace(
            scheduled_new_reqs=[new],
            scheduled_cached_reqs=nothing,
            num_scheduled_tokens={"s": BLOCK},
            total_num_scheduled_tokens=BLOCK,
        )
        return run.side.build_connector_meta(output)

    assert begin([1, 2, 3, 4], 3 * BLOCK).saves == []
    run.side.request_finished(run.request)
    run.side.request_finished(other)
    assert begin([1, 2, 3, 4], 0).saves != []  # all written anew


def test_blocks_from_before_a_reset_are_not_saved(monkeypatch: Any) -> None:
    run = Decoding(monkeypatch)
    run.step()
    run.side.reset_cache()
    assert run.step().saves == []
    run.side.get_num_new_matched_tokens(run.request, 0)  # computes from the start, after a preemption
    assert run.step().saves == [(0, 2)]


def test_before_the_engine_gives_its_memory_away_a_reset_waits_for_saves(monkeypatch: Any) -> None:
    monkeypatch.setattr(compat, "sleep_follows_reset", compat.may_sleep)  # workers are not told themselves
    run = Decoding(monkeypatch, sleep_mode=True)
    run.step()
    run.step(block=1)  # called off already, which does not mean that its copy has ended
    while len(run.client.saves) == 1:
        run.step()
    assert run.side.reset_cache() is True
    assert run.client.canceled == [1, 2]
    assert run.client.waits == 1
    assert run.side.reset_cache() is True
    assert run.client.waits == 1


def test_a_reset_before_sleep_fails_while_a_save_does_not_end(monkeypatch: Any) -> None:
    monkeypatch.setattr(compat, "sleep_follows_reset", compat.may_sleep)
    run = Decoding(monkeypatch, sleep_mode=True)
    run.client.slow = True
    run.step()
    assert run.side.reset_cache() is False


def test_before_the_engine_gives_its_memory_away_ranks_without_a_node_become_quiet(monkeypatch: Any) -> None:
    monkeypatch.setattr(compat, "sleep_follows_reset", compat.may_sleep)
    monkeypatch.setattr("flexkv.integration.vllm.save_orders._QUIET_SECONDS", 0.2)
    run = Decoding(monkeypatch, sleep_mode=True)
    run.step()
    run.client.connection = 0
    monkeypatch.setattr(run.client, "wait_ended_jobs", lambda timeout_s: False)
    begun = time.monotonic()
    assert run.side.reset_cache() is True
    assert time.monotonic() - begun >= 0.2
    begun = time.monotonic()
    assert run.side.reset_cache() is True
    assert time.monotonic() - begun < 0.2


def test_a_reset_waits_for_nobody_where_memory_stays(monkeypatch: Any) -> None:
    run = Decoding(monkeypatch)
    run.step()
    assert run.side.reset_cache() is True
    assert run.client.waits == 0
