"""KVManager and KVTPClient: the real core, real processes, CPU tensors."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flexkv._core")

from flexkv.common.config import CacheConfig, ModelConfig  # noqa: E402
from flexkv.common.request import KVResponseStatus  # noqa: E402
from flexkv.kvmanager import KVManager  # noqa: E402
from manager_ranks import BLOCKS, TOKENS, Ranks, Shape, engine, model, slots, started, tokens  # noqa: E402

SUCCESS = KVResponseStatus.SUCCESS
pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture(autouse=True)
def _small_pool(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "16MB")


@pytest.mark.parametrize(
    "shape",
    [
        *(Shape(form) for form in ("vllm", "triton", "sglang", "trt")),
        *(Shape(form, mla=True) for form in ("vllm", "sglang")),
    ],
    ids=lambda shape: shape.form + "-mla" * shape.mla,
)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_what_is_put_comes_back_byte_for_byte_on_every_rank(shape: Shape, tp_size: int) -> None:
    source, target = [3, 9, 4, 30], [20, 1, 2, 39]
    with engine(shape, tp_size) as (manager, group):
        group.ask("fill", source)
        written = group.ask("read", source)
        prompt = tokens(len(source) * TOKENS + 5)  # the rest fills no block
        task, missing = manager.put_match(prompt)
        assert missing.sum() == len(source) * TOKENS and not missing[len(source) * TOKENS :].any()
        assert manager.launch([task], [slots(source)]) == [task]
        assert manager.wait([task])[task].status is SUCCESS

        group.ask("clear")
        task, found = manager.get_match(prompt)
        assert found.tolist() == missing.tolist()
        manager.launch([task], [slots(target)], as_batch=True)
        response = manager.wait(task)[task]
        assert response.status is SUCCESS and response.return_mask.tolist() == found.tolist()
        assert group.ask("read", target) == written
        others = group.ask("read", [block for block in range(BLOCKS) if block not in target])
        assert not any(any(part) for rank in others for part in rank)
        if tp_size == 2 and not shape.mla:
            assert written[0] != written[1]


def test_only_missing_blocks_are_put_and_only_masked_ones_got() -> None:
    with engine() as (manager, group):
        group.ask("fill", range(6))
        prompt = tokens(6 * TOKENS)
        task = manager.put_async(prompt[: 2 * TOKENS], slots([0, 1]))
        assert manager.wait(task)[task].status is SUCCESS
        task, missing = manager.put_match(prompt)
        assert np.flatnonzero(missing).tolist() == list(range(2 * TOKENS, 6 * TOKENS))
        manager.launch(task, slots([2, 3, 4, 5]))
        assert manager.wait(task)[task].status is SUCCESS
        task, missing = manager.put_match(prompt)  # all is kept: nothing to launch
        assert not missing.any() and manager.try_wait(task)[task].status is SUCCESS

        mask = np.zeros(len(prompt), dtype=np.bool_)
        mask[3 * TOKENS :] = True
        written = group.ask("read", [3, 4, 5])
        task = manager.get_async(prompt, slots([10, 11, 12]), token_mask=mask)
        response = manager.wait(task)[task]
        assert response.status is SUCCESS
        assert response.return_mask.tolist() == mask.tolist() and response.get_mask().dtype == torch.bool
        assert group.ask("read", [10, 11, 12]) == written
        assert not any(group.ask("read", [9, 13])[0][0])


def test_namespaces_see_nothing_of_each_other() -> None:
    with engine() as (manager, group):
        group.ask("fill", [0])
        prompt = tokens(TOKENS)
        task = manager.put_async(prompt, slots([0]), namespace=["a", "b"])
        assert manager.wait(task)[task].status is SUCCESS
        for other in (None, [], ["a"], ["ab"], ["b", "a"], ["a", "b", ""]):
            task, found = manager.get_match(prompt, namespace=other)
            assert not found.any(), other
        assert manager.get_match(prompt, namespace=["a", "b"])[1].all()


def test_several_tasks_as_one_batch() -> None:
    with engine() as (manager, group):
        group.ask("fill", range(4))
        prompts = [tokens(2 * TOKENS, seed) for seed in (1, 2)]
        puts = [manager.put_match(prompt)[0] for prompt in prompts]
        (batch,) = manager.launch(puts, [slots([0, 1]), slots([2, 3])], as_batch=True)
        response = manager.wait(batch)[batch]
        assert response.status is SUCCESS and [mask.sum() for mask in response.return_mask] == [2 * TOKENS] * 2
        assert manager.try_wait([batch])[batch].status is KVResponseStatus.NOTFOUND
        gets = [manager.get_match(prompt)[0] for prompt in prompts]
        assert manager.launch([gets[0]], [slots([8, 9])], as_batch=True) == [gets[0]]
        assert manager.wait(gets[0])[gets[0]].status is SUCCESS


def test_a_task_says_where_it_stands() -> None:
    with engine() as (manager, group):
        prompt = tokens(TOKENS)
        task, _ = manager.put_match(prompt)
        assert manager.try_wait(task)[task].status is KVResponseStatus.UNREADY
        manager.cancel([task, 12345])
        assert manager.try_wait(task)[task].status is KVResponseStatus.CANCELLED
        assert manager.launch(task, slots([0])) == [task]  # too late: nothing is started
        assert manager.wait([task], timeout=0)[task].status is KVResponseStatus.NOTFOUND
        assert not manager.get_match(prompt)[1].any()


def test_puts_that_were_matched_before_a_reset_keep_nothing() -> None:
    with engine() as (manager, group):
        group.ask("fill", [0])
        prompt = tokens(TOKENS)
        put, _ = manager.put_match(prompt)
        manager.reset()
        manager.launch(put, slots([0]))
        assert manager.wait(put)[put].status is KVResponseStatus.FAILED
        assert not manager.get_match(prompt)[1].any()
        task = manager.put_async(prompt, slots([0]))
        assert manager.wait(task)[task].status is SUCCESS
        assert manager.get_match(prompt)[1].all()


def test_a_caller_that_never_waits_leaves_no_tasks_behind() -> None:
    with engine() as (manager, _group):
        running = []
        for number in range(200):
            manager.put_async(tokens(TOKENS, number), slots([0]))
            assert manager._client.wait_ended_jobs(10)
            running.append(len(manager._tasks.running))
        assert max(running) == 1


def test_a_rank_that_stops_fails_its_tasks_and_they_can_be_repeated() -> None:
    with engine(tp_size=2) as (manager, group):
        group.ask("fill", [0, 1])
        prompt = tokens(2 * TOKENS)
        assert group.ask("suspend") == [1, 1]
        task = manager.put_async(prompt, slots([0, 1]))
        assert manager.wait(task)[task].status is KVResponseStatus.FAILED
        assert not manager.get_match(prompt)[1].any()
        group.ask("resume")
        assert manager.is_ready()
        task = manager.put_async(prompt, slots([0, 1]))
        assert manager.wait(task)[task].status is SUCCESS
        task, found = manager.get_match(prompt)
        assert found.all()
        group.processes[1].kill()
        group.processes[1].join()
        manager.launch(task, slots([5, 6]))
        assert manager.wait(task)[task].status is KVResponseStatus.FAILED


@contextlib.contextmanager
def stopped(group: Ranks) -> Iterator[None]:
    """The first rank is told of transfers and does nothing."""
    rank = group.processes[0].pid
    os.kill(rank, signal.SIGSTOP)
    # The signal has only been sent: a thread of the rank's may still be at work.
    threads = Path(f"/proc/{rank}/task")
    while not all((thread / "stat").read_text().rpartition(")")[2].split()[0] == "T" for thread in threads.iterdir()):
        time.sleep(0.001)
    try:
        yield
    finally:
        os.kill(rank, signal.SIGCONT)


def test_a_cancelled_task_has_ended_only_when_its_ranks_are_quiet() -> None:
    with engine() as (manager, group):
        with stopped(group):
            task = manager.put_async(tokens(TOKENS), slots([0]))
            assert manager.wait(task, timeout=0)[task].status is KVResponseStatus.TIMEOUT
            manager.cancel(task)
            assert manager.try_wait(task) == {}  # the rank may still read the block
        assert manager.wait(task)[task].status is KVResponseStatus.CANCELLED
        assert not manager.get_match(tokens(TOKENS))[1].any()


def test_a_task_past_its_deadline_has_failed_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_SAVE_TIMEOUT_MS", "100")
    with engine() as (manager, group):
        with stopped(group):
            task = manager.put_async(tokens(TOKENS), slots([0]))
            assert manager.wait(task, timeout=3)[task].status is KVResponseStatus.TIMEOUT
        response = manager.wait(task)[task]
        assert response.status is KVResponseStatus.FAILED and response.reason == "deadline"
        assert not manager.get_match(tokens(TOKENS))[1].any()


def test_reset_forgets_and_a_flush_of_the_engine_need_not() -> None:
    with engine() as (manager, group):
        prompt = tokens(TOKENS)
        task = manager.put_async(prompt, slots([0]))
        manager.wait(task)
        manager.reset()
        assert not manager.get_match(prompt)[1].any()


@pytest.mark.parametrize(
    ("slot_mapping", "problem"),
    [
        (torch.arange(TOKENS + 1), "17 slots for 32 tokens"),
        (torch.arange(1, 2 * TOKENS + 1), "does not consist of whole blocks"),
        (torch.cat([torch.arange(TOKENS), torch.arange(2 * TOKENS, 3 * TOKENS).flip(0)]), "tokens 16 to 31"),
        (torch.arange(2 * TOKENS) - TOKENS, "slots that no tensor has"),
        (torch.arange(2 * TOKENS, dtype=torch.float32), "integers in one dimension"),
        (torch.arange(2 * TOKENS).reshape(2, TOKENS), "integers in one dimension"),
        (torch.arange(2 * TOKENS, device="meta"), "must be in host memory"),
    ],
)
def test_slots_that_are_no_whole_blocks_are_refused_and_start_nothing(slot_mapping: object, problem: str) -> None:
    with engine() as (manager, group):
        prompt = tokens(2 * TOKENS)
        task, _ = manager.put_match(prompt)
        with pytest.raises(ValueError, match=problem):
            manager.launch([task], [slot_mapping])
        assert manager.launch([task], [slots([0, 1])]) == [task]
        assert manager.wait(task)[task].status is SUCCESS


def test_blocks_that_no_tensor_has_fail_their_task_only() -> None:
    with engine() as (manager, group):
        task = manager.put_async(tokens(TOKENS), slots([BLOCKS]))
        assert manager.wait(task)[task].status is KVResponseStatus.FAILED
        task = manager.put_async(tokens(TOKENS), slots([BLOCKS - 1]))
        assert manager.wait(task)[task].status is SUCCESS


def test_damaged_calls_are_refused_in_words() -> None:
    with started(model()) as manager:
        with pytest.raises(ValueError, match="token_ids must be integers in one dimension"):
            manager.get_match(np.zeros((2, 16)))
        with pytest.raises(ValueError, match="token 3 is 4294967296"):
            manager.get_match(np.array([1, 2, 3, 1 << 32] * 4))
        with pytest.raises(ValueError, match="16 booleans"):
            manager.get_match(tokens(TOKENS), np.ones(TOKENS - 1, dtype=np.bool_))
        gap = np.array([True, False] * TOKENS)
        with pytest.raises(ValueError, match="has a gap"):
            manager.get_match(tokens(2 * TOKENS), gap)
        late = np.arange(2 * TOKENS) >= 5
        with pytest.raises(ValueError, match="begins with token 5"):
            manager.get_match(tokens(2 * TOKENS), late)
        with pytest.raises(ValueError, match="must begin with token 0"):
            manager.put_match(tokens(2 * TOKENS), np.arange(2 * TOKENS) >= TOKENS)
        assert not manager.get_match(tokens(2 * TOKENS), np.zeros(2 * TOKENS, dtype=np.bool_))[1].any()
        with pytest.raises(ValueError, match="1 slots for 16 masked tokens"):
            manager.put_async(tokens(TOKENS), [0])
    with pytest.raises(RuntimeError, match="not started, or was shut down"):
        manager.get_match(tokens(TOKENS))
    for fields, problem in ({"nnodes": 2}, "several machines"), ({"num_layers": 0}, "num_layers is 0"):
        with pytest.raises(ValueError, match=problem):
            KVManager(model(**fields) if "nnodes" in fields else ModelConfig(**fields), CacheConfig())


def test_without_ranks_nothing_is_found_and_puts_fail() -> None:
    with started(model()) as manager:
        assert not manager.is_ready()
        assert not manager.get_match(tokens(TOKENS))[1].any()
        task = manager.put_async(tokens(TOKENS), slots([0]))
        assert manager.wait(task)[task].status is KVResponseStatus.FAILED


def test_tasks_that_are_matched_and_dropped_do_not_pile_up() -> None:
    with engine() as (manager, group):
        prompt = tokens(4 * TOKENS)
        task = manager.put_async(prompt, slots([0, 1, 2, 3]))
        manager.wait(task)
        first, _ = manager.get_match(prompt)
        for _ in range(2000):
            last, found = manager.get_match(prompt)
            assert found.all()
        assert sum(one["sequences"] for one in status(manager)["engines"]) <= 512
        manager.launch([first, last], [slots([4, 5, 6, 7]), slots([8, 9, 10, 11])])  # also the oldest one
        assert {one.status for one in manager.wait([first, last]).values()} == {SUCCESS}


def status(manager: KVManager) -> dict:
    return json.loads(manager._node.status())


def test_the_example_runs() -> None:
    example = Path(__file__).parents[2] / "examples" / "kvmanager.py"
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=120)
    assert "equal, byte for byte: True" in done.stdout, done.stderr
