"""Several KV cache groups on the scheduler and the worker side, without an engine; and which models are refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from flexkv.integration.vllm.groups import Group, UnsupportedGroups, groups_of
from flexkv.integration.vllm.metadata import FlexKVMetadata, LoadOrder
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.worker import WorkerSide
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    RSWASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

FULL = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
WINDOW = SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=40)
STATES = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))
CONFIG: Any = SimpleNamespace(
    cache_config=SimpleNamespace(block_size=32, sliding_window=None),
    parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
    model_config=None,
)


def described(*specs: KVCacheSpec, hash_tokens: int | None = 16) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(100, [], groups, hash_block_size=hash_tokens)


def test_groups_of_a_hybrid_model() -> None:
    full, window = groups_of(CONFIG, described(FULL, WINDOW))
    assert (full.block_tokens, full.hashes_per_block, full.window) == (32, 2, None)
    assert (window.block_tokens, window.hashes_per_block, window.window) == (16, 1, 40)
    assert full.layers_of({"layer.0": "a", "layer.1": "b", "shares layer.0": "c"}) == {"layer.0": "a"}
    assert full.fingerprint(b"model") != window.fingerprint(b"model") != b"model"
    assert full.engine_id("e") != window.engine_id("e")


def test_one_group_is_what_it_was_without_groups() -> None:
    (group,) = groups_of(CONFIG, None)
    assert groups_of(CONFIG, described(FULL, hash_tokens=32)) == [group]
    assert (group.engine_id("e"), group.fingerprint(b"f"), group.model_name("m")) == ("e", b"f", "m")


def test_a_change_of_the_window_changes_the_fingerprint() -> None:
    wider = dataclasses.replace(WINDOW, sliding_window=41)
    fingerprints = [groups_of(CONFIG, described(FULL, spec))[1].fingerprint(b"f") for spec in (WINDOW, wider)]
    assert fingerprints[0] != fingerprints[1]


RSWA = RSWASpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32, rswa_window=64)
OTHER_DTYPE = dataclasses.replace(WINDOW, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "config",
    [
        described(FULL, STATES),
        described(STATES),
        described(RSWA),
        described(FULL, UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs={"layer.1": RSWA})),
        described(FULL, OTHER_DTYPE),
        described(FULL, WINDOW, hash_tokens=None),
        described(FULL, WINDOW, hash_tokens=32),
        described(*[FULL] * 13),
    ],
    ids=["states", "only states", "gap", "gap inside", "mixed precision", "no hashes", "coarse hashes", "too many"],
)
def test_refused(config: KVCacheConfig) -> None:
    with pytest.raises(UnsupportedGroups):
        groups_of(CONFIG, config)


def test_windows_with_a_gap_are_refused_also_where_the_engine_does_not_describe_them() -> None:
    config: Any = SimpleNamespace(**vars(CONFIG) | {"model_config": SimpleNamespace(rswa_window=128)})
    with pytest.raises(UnsupportedGroups):
        groups_of(config, None)


ONLY_WINDOWS: Any = SimpleNamespace(
    **vars(CONFIG) | {"cache_config": SimpleNamespace(block_size=16, sliding_window=WINDOW.sliding_window)}
)


# Named by block, a failed load would be computed again from that block on, whose window nobody has loaded.
def test_windows_alone_need_an_engine_that_takes_failures_by_request(monkeypatch: Any) -> None:
    with pytest.raises(UnsupportedGroups, match="flexkv.integration.vllm.connector"):
        groups_of(ONLY_WINDOWS, None)
    (group,) = groups_of(ONLY_WINDOWS, described(WINDOW))
    assert group.window == WINDOW.sliding_window
    monkeypatch.setattr("flexkv.integration.vllm.compat.TransferResults", None)
    with pytest.raises(UnsupportedGroups, match="as a whole"):
        groups_of(ONLY_WINDOWS, described(WINDOW))
    assert groups_of(CONFIG, described(FULL))


def test_models_whose_prompts_have_to_be_computed_whole_are_refused() -> None:
    config: Any = SimpleNamespace(**vars(CONFIG) | {"model_config": SimpleNamespace(is_prefix_caching_supported=False)})
    for described_or_not in (None, described(FULL)):
        with pytest.raises(UnsupportedGroups, match="computed whole"):
            groups_of(config, described_or_not)


def test_runs_leave_out_blocks_that_need_no_memory() -> None:
    group = groups_of(CONFIG, described(FULL, WINDOW))[1]
    assert group.runs([], 3) == []
    assert group.runs([0, 0], 3) == []
    assert group.runs([7, 8], 3) == [(3, [7, 8])]
    assert group.runs([0, 7, 0, 0, 8, 9], 3) == [(4, [7]), (7, [8, 9])]


@pytest.mark.parametrize(("computed", "first"), [(0, 0), (39, 0), (54, 0), (55, 1), (70, 1), (71, 2)])
def test_first_block_that_the_window_still_needs(computed: int, first: int) -> None:
    # As vLLM frees: what lies before (computed - window + 1) tokens.
    assert groups_of(CONFIG, described(FULL, WINDOW))[1].first_live(computed) == first
    assert groups_of(CONFIG, described(FULL, WINDOW))[0].first_live(computed) == 0


class Client:
    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.hashes: list[bytes] = []
        self.loads: list[tuple[int, list[int]]] = []
        self.saves: list[tuple[int, list[int]]] = []
        self.ended: list[tuple[int, str]] = []
        self.canceled: list[int] = []

    def cancel(self, job: int) -> None:
        self.canceled.append(job)

    def open_sequence(self) -> int:
        return 1

    def lookup(self, sequence: int, hashes: list[bytes], in_engine: int) -> tuple[int, str, int]:
        self.hashes = list(hashes)
        return min(self.kept, len(hashes)), "never_seen", 0

    def load(self, sequence: int, first: int, blocks: list[int]) -> int:
        self.loads.append((first, blocks))
        return 100 + len(self.loads)

    def save(self, sequence: int, hashes: list[bytes], first: int, blocks: list[int]) -> int:
        self.saves.append((first, blocks))
        return len(self.saves)

    def take_ended_jobs(self) -> list[tuple[int, str]]:
        ended, self.ended = self.ended, []
        return ended

    def generation(self) -> int:
        return 0


class Scheduling:
    """A request of 200 tokens: blocks of 32 with full attention, and of 16 with a window of 40 tokens."""

    def __init__(self, monkeypatch: Any, kept_full: int, kept_window: int, only_windows: bool = False) -> None:
        self.full, self.window = Client(kept_full), Client(kept_window)
        clients = [self.window] if only_windows else [self.full, self.window]
        config, specs = (ONLY_WINDOWS, [WINDOW]) if only_windows else (CONFIG, [FULL, WINDOW])
        monkeypatch.setattr("flexkv.integration.vllm.scheduler.open_clients", lambda *_: (clients, None, None))
        settings: Any = SimpleNamespace(
            sync_load_max_bytes=1 << 40,
            min_load_tokens=0,
            save_timeout_ms=100,
            kv_events=False,
            reaches_beyond_memory=False,
        )
        self.side = SchedulerSide(config, settings, groups_of(config, described(*specs)))
        self.request: Any = SimpleNamespace(
            request_id="r",
            kv_transfer_params=None,
            block_hashes=[b"%d" % i for i in range(12)],
            num_tokens=200,
            num_preemptions=0,
        )

    def step(self, tables: tuple[list[int], ...], computed: int, scheduled: int, name: str = "r") -> FlexKVMetadata:
        new = SimpleNamespace(req_id=name, num_computed_tokens=computed, block_ids=tables)
        none = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
        output: Any = SimpleNamespace(
            scheduled_new_reqs=[new],
            scheduled_cached_reqs=none,
            num_scheduled_tokens={name: scheduled},
            total_num_scheduled_tokens=scheduled,
        )
        return self.side.build_connector_meta(output)


# The group that has least decides, and the end is one of both groups' blocks.
@pytest.mark.parametrize(
    ("kept_full", "kept_window", "local", "loaded"),
    [(6, 12, 0, 192), (6, 7, 0, 96), (2, 12, 0, 64), (6, 1, 0, 0), (6, 0, 0, 0), (6, 12, 64, 128), (6, 7, 96, 0)],
)
def test_lookup_counts_what_all_groups_have(
    monkeypatch: Any, kept_full: int, kept_window: int, local: int, loaded: int
) -> None:
    run = Scheduling(monkeypatch, kept_full, kept_window)
    # Beside the engine's steps: vLLM takes failed loads only by request.
    assert run.side.get_num_new_matched_tokens(run.request, local) == (loaded, loaded > 0)
    assert run.full.hashes == run.request.block_hashes[1::2]
    assert run.window.hashes == run.request.block_hashes


def test_windows_alone_are_loaded_beside_the_engines_steps(monkeypatch: Any) -> None:
    run = Scheduling(monkeypatch, 0, 12, only_windows=True)
    assert run.side.get_num_new_matched_tokens(run.request, 0) == (192, True)


def test_a_request_that_needs_its_whole_prompt_computed_loads_nothing(monkeypatch: Any) -> None:
    """For the log-probabilities of its prompt; vLLM asks all the same before 0.31."""
    run = Scheduling(monkeypatch, 6, 12)
    run.request.skip_reading_prefix_cache = True
    assert run.side.get_num_new_matched_tokens(run.request, 0) == (0, False)


def test_only_blocks_with_memory_are_loaded(monkeypatch: Any) -> None:
    run = Scheduling(monkeypatch, 6, 12)
    run.side.get_num_new_matched_tokens(run.request, 64)
    tables = ([1, 2, 3, 4, 5, 6, 7], [0] * 9 + [11, 12, 13, 14])
    run.side.update_state_after_alloc(run.request, SimpleNamespace(get_block_ids=lambda: tables), 128)
    assert run.full.loads == [(2, [3, 4, 5, 6])]
    assert run.window.loads == [(9, [11, 12, 13])]
    (order,) = run.step(([], []), 0, 0, "another").loads
    assert order == LoadOrder("r", False, [3, 4, 5, 6, 11, 12, 13], [(0, 101), (1, 101)], complete=True)


def test_a_load_of_which_a_part_could_not_be_ordered_is_known_as_incomplete(monkeypatch: Any) -> None:
    run = Scheduling(monkeypatch, 6, 12)
    run.side.get_num_new_matched_tokens(run.request, 0)
    monkeypatch.setattr(run.window, "load", None)
    tables = ([1, 2, 3, 4, 5, 6, 7], [0] * 9 + [11, 12, 13, 14])
    with pytest.raises(TypeError):
        run.side.update_state_after_alloc(run.request, SimpleNamespace(get_block_ids=lambda: tables), 192)
    (order,) = run.step(([], []), 0, 0, "another").loads
    assert order.jobs == [(0, 101)]
    assert not order.complete


def test_a_window_group_saves_only_what_it_still_has(monkeypatch: Any) -> None:
    run = Scheduling(monkeypatch, 0, 0)
    run.side.get_num_new_matched_tokens(run.request, 0)
    # 128 tokens from the engine's own cache, of which the window has the last three blocks.
    tables = ([1, 2, 3, 4, 5, 6], [0] * 5 + [11, 12, 13, 14, 15, 16, 17])
    meta = run.step(tables, 128, 64)
    assert run.full.saves == [(0, [1, 2, 3, 4, 5, 6])]
    assert run.window.saves == [(5, [11, 12, 13, 14, 15, 16, 17])]
    assert meta.saves == [(0, 1), (1, 1)]
    assert run.full.canceled == run.window.canceled == []


def test_a_save_whose_block_changed_hands_is_canceled(monkeypatch: Any) -> None:
    run = Scheduling(monkeypatch, 0, 0)
    run.side.get_num_new_matched_tokens(run.request, 0)
    run.step(([1, 2], [11, 12, 13, 14]), 0, 64)
    # Given back by the window group, now in the full group of a request that was never looked up.
    run.step(([11], [30, 31]), 0, 32, "unknown")
    assert (run.full.canceled, run.window.canceled) == ([], [1])
    run.step(([12], [32, 33]), 0, 32, "unknown")  # of the same save, which is forgotten
    assert (run.full.canceled, run.window.canceled) == ([], [1])


def test_all_saves_are_given_up_when_ordering_them_fails(monkeypatch: Any) -> None:
    run = Scheduling(monkeypatch, 0, 0)
    run.side.get_num_new_matched_tokens(run.request, 0)
    run.step(([1, 2], [11, 12, 13, 14]), 0, 64)
    meta = run.step(([1],), 0, 32)  # a table is missing
    assert meta.saves == []
    assert (run.full.canceled, run.window.canceled) == ([1], [1])


class Agent:
    def __init__(self) -> None:
        self.armed: list[int] = []
        self.ended: list[tuple[int, bool, int]] = []  # as the core's agent tells it

    def arm_loads(self, jobs: list[int], stream: int) -> None:
        self.armed += jobs

    def take_loads(self) -> list[tuple[int, bool, int]]:
        ended, self.ended = self.ended, []
        return ended


@pytest.fixture
def worker() -> WorkerSide:
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=1))
    settings: Any = None
    groups: list[Group] = []
    side = WorkerSide(config, settings, groups, None)
    side._agents = [Agent(), Agent()]
    return side


@pytest.mark.parametrize(
    ("complete", "outcomes", "good"),
    [
        (True, (True, True), 2),
        (True, (True, False), 0),
        (True, (False, True), 0),
        (False, (True, True), 0),
    ],
)
def test_a_load_ends_with_its_last_job(
    worker: WorkerSide, complete: bool, outcomes: tuple[bool, bool], good: int
) -> None:
    order = LoadOrder("r", False, [1, 2], [(0, 5), (1, 5)], complete)
    worker.start_loads(FlexKVMetadata(step=1, loads=[order]), False)
    assert [agent.armed for agent in worker._agents] == [[5], [5]]
    worker._agents[1].ended = [(5, outcomes[1], 1)]
    assert worker.take_ended_loads(2) == []
    worker._agents[0].ended = [(5, outcomes[0], 1)]
    assert worker.take_ended_loads(3) == [(order, good)]
    assert worker.take_bad_blocks() == set()  # by request only


@pytest.mark.parametrize(("window", "good"), [(None, 2), (40, 0)])
def test_of_one_group_the_beginning_is_kept_unless_it_is_a_window(
    worker: WorkerSide, window: int | None, good: int
) -> None:
    worker._groups = [Group(0, 1, 16, 1, window, None)]
    worker._agents = [Agent()]
    order = LoadOrder("r", False, [7, 8, 9], [(0, 5)], True)
    worker.start_loads(FlexKVMetadata(step=1, loads=[order]), False)
    worker._agents[0].ended = [(5, False, 2)]
    assert worker.take_ended_loads(2) == [(order, good)]


def test_of_several_jobs_for_one_request_all_or_none_count(worker: WorkerSide) -> None:
    worker._groups = [Group(0, 1, 16, 1, None, None)]
    order = LoadOrder("r", False, [7, 8, 9], [(0, 5), (0, 6)], True)
    worker.start_loads(FlexKVMetadata(step=1, loads=[order]), False)
    worker._agents[0].ended = [(5, True, 2), (6, False, 0)]
    assert worker.take_ended_loads(2) == [(order, 0)]


def test_a_load_of_which_nothing_could_be_ordered_fails_at_once(worker: WorkerSide) -> None:
    order = LoadOrder("r", False, [1, 2])
    worker.start_loads(FlexKVMetadata(step=1, loads=[order]), False)
    assert worker.take_ended_loads(1) == [(order, 0)]
