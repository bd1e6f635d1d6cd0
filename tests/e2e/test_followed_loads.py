"""Loads within a step, which the forward follows layer by layer: what the worker side does with a rank agent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.integration.vllm.groups import Group
from flexkv.integration.vllm.metadata import FlexKVMetadata, LoadOrder
from flexkv.integration.vllm.vllm_v1_adapter import _layers_will_ask
from flexkv.integration.vllm.worker import WorkerSide, _FollowedLoads

LAYERS = {"a": 1, "b": 1, "c": 2, "d": 3}


class Agent:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.failing: dict[int, int] = {}  # and how many of its blocks are there
        self.broken = False

    def arm_loads_in_parts(self, jobs: list[int], stream: int) -> None:
        if self.broken:
            raise RuntimeError("broken")
        self.calls.append(("arm", list(jobs)))

    def hold_engine(self, jobs: list[int], parts: int, stream: int) -> None:
        self.calls.append(("hold", parts))

    def wait_loads(self, jobs: list[int]) -> list[tuple[int, int]]:
        self.calls.append("wait")
        return [(job, good) for job, good in self.failing.items() if job in jobs]

    def take_loads(self) -> list[tuple[int, bool, int]]:
        return []

    def take_calls(self) -> list[Any]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def worker() -> WorkerSide:
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=1))
    settings: Any = None
    side = WorkerSide(config, settings, [], None)
    side._agents = [Agent()]
    side._followed = _FollowedLoads(LAYERS)
    return side


def step(number: int) -> FlexKVMetadata:
    orders = [LoadOrder("r", True, [1, 2], [(0, 5)], True), LoadOrder("s", True, [3], [(0, 6)], True)]
    return FlexKVMetadata(step=number, loads=orders, saves=[(0, 9)])


def test_each_layer_waits_for_its_part_alone(worker: WorkerSide) -> None:
    agent = worker._agents[0]
    worker.start_loads(step(1), True)
    assert agent.take_calls() == [("arm", [5, 6])]
    for layer in LAYERS:
        worker.before_layer(layer)
    assert agent.take_calls() == [("hold", 1), ("hold", 2), ("hold", 3)]
    assert worker.take_ended_loads(1) == []
    assert agent.take_calls() == ["wait"]
    assert worker.take_bad_blocks() == set()
    worker.before_layer("a")
    assert agent.take_calls() == []


def test_a_layer_of_no_known_name_waits_for_all(worker: WorkerSide) -> None:
    worker.start_loads(step(1), True)
    worker.before_layer("x")
    assert worker._agents[0].take_calls()[1:] == [("hold", 3)]


def test_where_layers_do_not_ask_the_forward_waits(worker: WorkerSide) -> None:
    worker.start_loads(step(1), False)
    assert worker._agents[0].take_calls() == [("arm", [5, 6]), ("hold", 3)]
    assert worker.take_bad_blocks() == set()


def test_blocks_that_a_layer_may_have_read_too_early_are_computed_again(worker: WorkerSide) -> None:
    worker.start_loads(step(1), True)
    worker.before_layer("c")
    assert worker.take_bad_blocks() == {1, 2, 3}
    worker._agents[0].take_calls()
    worker.start_loads(step(50), True)  # from now on nobody relies on the layers
    assert worker._agents[0].take_calls() == [("arm", [5, 6]), ("hold", 3)]
    assert worker.take_bad_blocks() == set()


def test_a_failed_load_is_reported_and_the_step_saves_nothing(worker: WorkerSide) -> None:
    agent = worker._agents[0]
    agent.failing = {6: 0}
    agent.cancel = lambda jobs: agent.calls.append(("cancel", jobs))
    worker.start_loads(step(1), False)
    agent.take_calls()
    worker.hears_before_forward = True
    worker.start_saves(step(1))
    assert agent.take_calls() == ["wait", ("cancel", [9])]
    assert worker.take_bad_blocks() == {3}


def test_of_a_load_that_ends_early_only_the_rest_is_computed(worker: WorkerSide) -> None:
    worker._groups = [Group(0, 1, 16, 1, None, None)]
    worker._agents[0].failing = {5: 1}
    worker.start_loads(step(1), False)
    assert worker.take_bad_blocks() == {2}


def test_loads_that_could_not_be_begun_have_failed(worker: WorkerSide) -> None:
    worker._agents[0].broken = True
    with pytest.raises(RuntimeError):
        worker.start_loads(step(1), True)
    for layer in LAYERS:  # the engine goes on, and nothing keeps its layers from asking
        worker.before_layer(layer)
    assert worker.take_bad_blocks() == {1, 2, 3}


def test_loads_within_a_step_have_failed_when_those_beside_it_could_not_be_begun(worker: WorkerSide) -> None:
    def arm_loads(jobs: list[int], stream: int) -> None:
        raise RuntimeError("broken")

    worker._agents[0].arm_loads = arm_loads
    meta = step(1)
    meta.loads.insert(0, LoadOrder("parked", False, [8], [(0, 4)], True))
    with pytest.raises(RuntimeError):
        worker.start_loads(meta, True)
    for layer in LAYERS:
        worker.before_layer(layer)
    assert worker.take_bad_blocks() == {1, 2, 3}


@pytest.mark.parametrize(
    ("mode", "metadata", "asked"),
    [("NONE", {}, True), ("PIECEWISE", {}, True), ("FULL", {}, False), ("NONE", None, False), (None, {}, False)],
)
def test_layers_ask_unless_a_full_graph_is_replayed(mode: str | None, metadata: Any, asked: bool) -> None:
    context = SimpleNamespace(attn_metadata=metadata)
    context.cudagraph_runtime_mode = None if mode is None else SimpleNamespace(name=mode)
    assert _layers_will_ask(context) is asked
    assert _layers_will_ask(None) is False
