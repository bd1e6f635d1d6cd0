"""KVManager and KVTPClient: the real core, real processes, CPU tensors."""

from __future__ import annotations

import contextlib
import os
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
from manager_ranks import BLOCKS, DIM, HEADS, LAYERS, TOKENS, Ranks, Shape, ranks  # noqa: E402

SUCCESS = KVResponseStatus.SUCCESS
pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture(autouse=True)
def _small_pool(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "16MB")


def model(**fields: object) -> ModelConfig:
    return ModelConfig(num_layers=LAYERS, num_kv_heads=HEADS, head_size=DIM, **fields)  # type: ignore[arg-type]


@contextlib.contextmanager
def started(model_config: ModelConfig, cache: CacheConfig | None = None, **more: object) -> Iterator[KVManager]:
    manager = KVManager(model_config, cache or CacheConfig(tokens_per_block=TOKENS), **more)  # type: ignore[arg-type]
    manager.start()
    try:
        yield manager
    finally:
        manager.shutdown()


@contextlib.contextmanager
def engine(shape: Shape = Shape("vllm"), tp_size: int = 1) -> Iterator[tuple[KVManager, Ranks]]:
    with started(model(tp_size=tp_size, use_mla=shape.mla or None)) as manager:
        clients = [{"intra_client_id": rank} for rank in range(tp_size)]
        with ranks(manager.gpu_register_port, shape, clients) as group:
            assert manager.is_ready()
            yield manager, group


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128_000, count)


def slots(blocks: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(block * TOKENS, (block + 1) * TOKENS) for block in blocks])


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


def test_a_running_task_is_cancelled_when_its_ranks_are_quiet_and_ends_by_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLEXKV_SAVE_TIMEOUT_MS", "700")
    with engine() as (manager, group):
        os.kill(group.processes[0].pid, 19)  # SIGSTOP: the rank is told, and does nothing
        try:
            tasks = [manager.put_async(tokens(TOKENS, seed), slots([0])) for seed in (1, 2)]
            assert manager.wait(tasks, timeout=0)[tasks[0]].status is KVResponseStatus.TIMEOUT
            manager.cancel(tasks[0])
            assert manager.try_wait(tasks) == {}  # the rank may still read the blocks
        finally:
            os.kill(group.processes[0].pid, 18)
        ended = manager.wait(tasks)
        assert {ended[task].status for task in tasks} <= {KVResponseStatus.CANCELLED, KVResponseStatus.FAILED, SUCCESS}
        assert ended[tasks[0]].status is KVResponseStatus.CANCELLED


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


def test_a_second_manager_with_the_same_port_is_refused_and_one_with_another_is_not() -> None:
    with started(model()), pytest.raises(RuntimeError, match="give this one, and its ranks, another server_recv_port"):
        KVManager(model(), CacheConfig()).start()
    with started(model()), started(model(), server_recv_port="ipc:///tmp/other"):
        pass


def test_data_parallel_ranks_share_the_node_of_the_first() -> None:
    prompt = tokens(2 * TOKENS)
    with (
        started(model(dp_size=2)) as first,
        started(model(dp_size=2), dp_client_id=1) as second,
        ranks(first.gpu_register_port, Shape("vllm"), [{"dp_client_id": 0}, {"dp_client_id": 1}]) as group,
    ):
        for manager in (first, second):
            wait_ready(manager)
        group.ask("fill", [0, 1])
        written = group.ask("read", [0, 1])[0]
        task = first.put_async(prompt, slots([0, 1]))
        assert first.wait(task)[task].status is SUCCESS
        task = second.get_async(prompt, slots([6, 7]))
        assert second.wait(task)[task].return_mask.all()
        assert group.ask("read", [6, 7])[1] == written


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
    import json

    return json.loads(manager._node.status())


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = start_daemon()
    yield process
    process.kill()
    process.wait()


def start_daemon() -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", "flexkv.cli", "serve", "--name", "default"])
    socket = Path(os.environ["FLEXKV_RUNTIME_DIR"], "default.sock")
    deadline = time.monotonic() + 60
    while not socket.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert socket.exists()
    return process


def test_a_daemon_keeps_what_one_engine_put_for_the_next_and_engines_survive_it(
    monkeypatch: pytest.MonkeyPatch, daemon: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setenv("FLEXKV_SERVER_LAUNCH_MODE", "external")
    prompt = tokens(3 * TOKENS)
    named = {"tp_size": 2, "identity": "model and weights"}
    clients = [{"intra_client_id": rank} for rank in range(2)]
    with started(model(**named)) as manager, ranks(manager.gpu_register_port, Shape("sglang"), clients) as group:
        wait_ready(manager)
        group.ask("fill", [0, 1, 2])
        written = group.ask("read", [0, 1, 2])
        task = manager.put_async(prompt, slots([0, 1, 2]))
        assert manager.wait(task)[task].status is SUCCESS
    with started(model(**named)) as manager, ranks(manager.gpu_register_port, Shape("sglang"), clients) as group:
        wait_ready(manager)
        task = manager.get_async(prompt, slots([5, 6, 7]))
        assert manager.wait(task)[task].return_mask.all()
        assert group.ask("read", [5, 6, 7]) == written

        daemon.kill()
        daemon.wait()
        task = manager.put_async(tokens(TOKENS, 9), slots([0]))
        assert manager.wait(task)[task].status is KVResponseStatus.FAILED
        assert not manager.get_match(prompt)[1].any()
        again = start_daemon()
        try:
            wait_ready(manager)
            task = manager.put_async(prompt, slots([5, 6, 7]))
            assert manager.wait(task)[task].status is SUCCESS
        finally:
            again.kill()
            again.wait()


def test_what_nobody_named_is_not_shared_through_a_daemon(
    monkeypatch: pytest.MonkeyPatch, daemon: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setenv("FLEXKV_SERVER_LAUNCH_MODE", "external")
    for _ in range(2):
        with started(model()) as manager, ranks(manager.gpu_register_port, Shape("vllm"), [{}]) as _group:
            wait_ready(manager)
            assert not manager.get_match(tokens(TOKENS))[1].any()
            task = manager.put_async(tokens(TOKENS), slots([0]))
            assert manager.wait(task)[task].status is SUCCESS


def wait_ready(manager: KVManager) -> None:
    deadline = time.monotonic() + 60
    while not manager.is_ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)
