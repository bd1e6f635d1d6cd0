"""The connector for TensorRT-LLM: the real core, real agents and KV memory, and an executor of our own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flexkv._core")

import trtllm_stand_in as stand_in  # noqa: E402
from flexkv import _core  # noqa: E402
from flexkv.config import load  # noqa: E402
from flexkv.node_start import start_node  # noqa: E402
from trtllm_executor import BLOCK, Executor, executor_config, llm_args  # noqa: E402

PROMPT = list(range(100, 100 + 3 * BLOCK + 1))
Start = Callable[..., Executor]


@pytest.fixture(autouse=True)
def _own_node(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "16MB")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    executors: list[Executor] = []

    def started(version: str = "1.3", **options: Any) -> Executor:
        executors.append(Executor(stand_in.install(monkeypatch, version), version, **options))
        return executors[-1]

    yield started
    for executor in executors:
        executor.close()


def fill(executor: Executor, prompt: list[int] = PROMPT, **options: Any) -> None:
    """Computes the prompt until its blocks are kept: nothing is of steps before all ranks were there."""
    blocks, salt = len(prompt) // BLOCK, options.get("cache_salt")
    name_space = ["cache_salt", salt] if salt is not None else []

    def kept() -> bool:
        executor.run(prompt, new_tokens=2, **options)
        return executor.kept_blocks(prompt, name_space) >= blocks

    executor.run_until(kept)


class Recorder:
    """In front of the scheduler's client: what was ordered and canceled; `deaf`: how jobs ended is not heard of."""

    def __init__(self, executor: Executor) -> None:
        self._client = executor.scheduler._side._client
        self.canceled: list[int] = []
        self.saved: dict[int, list[int]] = {}
        self.deaf = False
        executor.scheduler._side._client = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def cancel(self, job: int) -> None:
        self.canceled.append(job)
        self._client.cancel(job)

    def save(self, sequence: int, hashes: Any, first: int, blocks: list[int]) -> int:
        job = self._client.save(sequence, hashes, first, blocks)
        self.saved[job] = blocks
        return int(job)

    def take_ended_jobs(self) -> list[Any]:
        return [] if self.deaf else self._client.take_ended_jobs()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("version", ["1.1", "1.2", "1.3"])
def test_what_was_computed_comes_back_byte_for_byte_on_every_rank(start: Start, version: str, tp: int) -> None:
    executor = start(version, tp=tp, config=executor_config(tp) if version == "1.1" else llm_args(tp))
    fill(executor)
    again = executor.run(PROMPT)  # the executor checks the bytes on each rank
    assert again.loaded == 3 * BLOCK
    longer = executor.run([*PROMPT, 7, 8, 9])
    assert longer.loaded == 3 * BLOCK
    assert executor.run(PROMPT[: 2 * BLOCK]).loaded == BLOCK  # the last token is computed
    assert executor.run([5, *PROMPT[1:]]).loaded == 0


def test_blocks_that_decoding_completes_are_kept_too(start: Start) -> None:
    executor = start()
    first = executor.run(PROMPT, new_tokens=3 * BLOCK)
    executor.wait_until_kept(first.tokens, 5)
    assert executor.run([*first.tokens, 1]).loaded >= 5 * BLOCK


def test_what_the_engine_has_itself_is_not_loaded(start: Start) -> None:
    executor = start(blocks=6, reuse=True)
    fill(executor)
    whole = executor.run(PROMPT)
    assert (whole.local, whole.loaded) == (3 * BLOCK, 0)
    kept = whole.block_ids[0]  # the engine gives all other blocks away
    executor.free.sort(key=lambda block: block == kept)
    executor.run([*range(4 * BLOCK)])
    part = executor.run(PROMPT)
    assert (part.local, part.loaded) == (BLOCK, 2 * BLOCK)
    assert part.block_ids[0] == kept
    # Half a block of its own, as with partial reuse: TensorRT-LLM would compute from the middle of a block.
    assert executor.scheduler.get_num_new_matched_tokens(executor.add(PROMPT), BLOCK // 2) == (0, False)


def test_a_request_that_is_parked_holds_up_no_other(start: Start) -> None:
    executor = start()
    fill(executor)
    requests = [executor.add(PROMPT), executor.add([*range(9)], new_tokens=3), executor.add(PROMPT)]
    executor.run_until(lambda: all(request.state == "finished" for request in requests))
    assert [request.loaded for request in requests] == [3 * BLOCK, 0, 3 * BLOCK]


def test_salts_and_adapters_do_not_mix(start: Start) -> None:
    executor = start()
    kinds: list[dict[str, Any]] = [
        {},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"lora_task_id": 1},
        {"lora_task_id": 2},
    ]
    for options in kinds:
        assert executor.run(PROMPT, **options).loaded == 0, options
        executor.run_until(lambda options=options: executor.run(PROMPT, **options).loaded > 0)


def test_adapters_of_an_engine_that_was_started_anew_are_others(start: Start, node: Any) -> None:
    fill(start(), lora_task_id=None)
    before = start()
    before.run_until(lambda: before.run(PROMPT, lora_task_id=1).loaded > 0)
    assert before.run(PROMPT).loaded > 0  # found by another engine, through the daemon
    after = start()
    after.run_until(lambda: after.run(PROMPT).loaded > 0)
    assert after.run(PROMPT, lora_task_id=1).loaded == 0


def test_what_tokens_do_not_tell_is_neither_served_nor_kept(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    executor = start()
    fill(executor)
    recorder = Recorder(executor)
    with caplog.at_level(logging.WARNING, "flexkv"):
        for _ in range(2):
            assert executor.run(PROMPT, multimodal_hashes=[[1]]).loaded == 0
    assert recorder.saved == {}
    (line,) = [record.message for record in caplog.records if "multimodal_hashes" in record.message]
    assert "computed without the cache: it has inputs besides its tokens" in line


def test_a_salt_that_the_lookup_did_not_tell_is_not_kept_without_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = start()
    executor.run([1, 2, 3, 4, 5])
    recorder = Recorder(executor)
    told = executor._data
    monkeypatch.setattr(executor, "_data", lambda request: SimpleNamespace(**vars(told(request)) | {"cache_salt": "s"}))
    executor.run(PROMPT, new_tokens=8)
    assert recorder.saved == {}


def test_a_request_that_was_paused_and_is_told_of_only_in_part_is_not_kept(start: Start) -> None:
    executor = start()
    executor.run([1, 2, 3, 4, 5])
    recorder = Recorder(executor)
    again = executor.add(PROMPT, new_tokens=8)
    executor._told[again.request_id] = len(PROMPT), 3  # of its earlier life, in other blocks
    executor.run_until(lambda: again.state == "finished")
    assert recorder.saved == {}


def test_a_save_is_canceled_before_the_step_that_overwrites_its_blocks(start: Start) -> None:
    executor = start(blocks=4)
    fill(executor, [1, 2, 3, 4])
    recorder = Recorder(executor)
    recorder.deaf = True  # for all the scheduler knows, the save is still running
    executor.run(PROMPT)
    (job,) = recorder.saved
    assert recorder.canceled == []
    executor.free.sort(key=lambda block: block not in recorder.saved[job])  # and its blocks come next
    executor.run([50, 51, 52])
    assert recorder.canceled == [job]
    executor.run([60, 61, 62])
    assert recorder.canceled == [job]


def test_a_load_of_a_request_that_was_canceled_unseen_writes_nothing_into_the_next_ones_blocks(start: Start) -> None:
    executor = start(blocks=4)
    fill(executor, PROMPT[: 2 * BLOCK])
    (worker,) = executor.workers
    start_loads, worker._side.start_loads = worker._side.start_loads, lambda stream: None  # it is slow to begin
    parked = executor.add([*PROMPT[: 2 * BLOCK], 1])
    executor.step()
    assert parked.loaded == 2 * BLOCK
    job, _ = executor.scheduler._side._loading[parked.request_id]
    executor.cancel_unseen(parked)
    next_one = executor.add([*range(3 * BLOCK)], new_tokens=3)
    executor.step()
    assert set(parked.block_ids) < set(next_one.block_ids)
    start_loads(None)
    assert worker._side._agent.wait_loads([job]) == [(job, 0)]  # it has failed
    executor.run_until(lambda: not executor.requests)  # the executor checks the bytes


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_to_requests_nobody_computes_from_bytes_of_others(start: Start, seed: int) -> None:
    """Few blocks, shared prefixes, salts, and requests that are canceled at any time: the executor checks the bytes."""
    random = Random(seed)
    executor = start(tp=2, blocks=16, reuse=bool(seed % 2))
    fill(executor)
    prompts = [PROMPT, [*PROMPT[:BLOCK], *range(9)], [*PROMPT[: 2 * BLOCK], *range(11)], [*range(14)]]
    loaded = 0
    for _ in range(200):
        if len(executor.requests) < 6:
            prompt = random.choice(prompts)[: random.randint(2, 19)]
            salt = random.choice([None, None, "a"])
            executor.add(prompt, new_tokens=random.randint(1, 9), cache_salt=salt)
        started = [request for request in executor.requests if request.state != "waiting"]
        if started and random.random() < 0.15:
            executor.cancel_unseen(random.choice(started))
        if random.random() < 0.2:
            executor.forget_own()
        before = set(executor.requests)
        executor.step()
        loaded += sum(request.loaded for request in before if request.state == "finished")
    executor.run_until(lambda: not executor.requests)
    assert loaded > 0


def test_a_load_that_no_step_told_of_is_begun_by_nobody(start: Start) -> None:
    """Its request ended before: its blocks are free at once, and the next one's."""
    executor = start()
    fill(executor)
    request = executor.add(PROMPT)
    executor._admit(request)
    assert request.state == "parked"
    assert executor.scheduler.request_finished(request, request.block_ids) is False
    executor.cancel_unseen(request)
    side = executor.workers[0]._side
    executor.step()
    assert not side._running and not side._outcomes
    assert executor.run(PROMPT).loaded == 3 * BLOCK


def test_blocks_are_held_where_the_engine_tells_of_a_canceled_load(start: Start) -> None:
    executor = start()
    fill(executor)
    parked = executor.add(PROMPT)
    worker = executor.workers[0]
    start_loads, worker._side.start_loads = worker._side.start_loads, lambda stream: None
    executor.step()
    assert executor.scheduler.request_finished(parked, parked.block_ids) is True
    assert worker.get_finished([parked.request_id], []) == ([], [])
    worker._side.start_loads = start_loads
    executor.requests.remove(parked)
    executor.held.add(parked.request_id)
    executor.run_until(lambda: bool(executor.saved))
    assert executor.saved == [parked.request_id]


@pytest.fixture
def node(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A daemon that engines use."""
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "16MB")
    monkeypatch.setenv("FLEXKV_NODE", "default")
    started = start_node(_core, load(), "daemon", "default")
    yield started
    started.stop()


@pytest.mark.parametrize("version", ["1.3", "branch"])
def test_a_load_that_failed_is_never_reported_as_loaded(
    start: Start, node: Any, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    executor = start(version, tp=2)
    executor.run_until(lambda: executor.run(PROMPT).loaded > 0)
    stuck = executor.add(PROMPT)
    executor.before_bind = node.stop  # between the promise and the copy
    with caplog.at_level(logging.WARNING, "flexkv"):
        executor.step()
        executor.run_until(lambda: len([r for r in caplog.records if "could not be loaded" in r.message]) == 2)
    assert executor.run([*PROMPT, 1], new_tokens=3).loaded == 0  # the engine goes on
    assert stuck.state == "parked"
    assert executor.failed == ({stuck.request_id} if version == "branch" else set())
    assert all(("no way" in r.message) == (version == "1.3") for r in caplog.records if "could not be" in r.message)


def test_an_engine_outlives_its_node_and_finds_it_again(start: Start, node: Any) -> None:
    executor = start()
    executor.run_until(lambda: executor.run(PROMPT).loaded > 0)
    node.stop()
    assert executor.run(PROMPT, new_tokens=9).loaded == 0
    again = start_node(_core, load(), "daemon", "default")
    try:
        executor.run_until(lambda: executor.run(PROMPT).loaded > 0)
    finally:
        again.stop()


def test_nothing_is_raised_on_the_engines_thread(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    executor = start()
    fill(executor)
    executor.scheduler._side._client.close()
    executor.workers[0]._side._agent.stop()
    assert executor.run(PROMPT, new_tokens=5).loaded == 0
    assert "get_num_new_matched_tokens failed" in caplog.text


def test_a_load_that_could_not_even_be_ordered_has_failed(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    executor = start()
    fill(executor)

    class Refusing(Recorder):
        def load(self, *arguments: Any) -> int:
            raise RuntimeError("no")

    Refusing(executor)
    stuck = executor.add(PROMPT)
    executor.run_until(lambda: "could not be loaded" in caplog.text)
    assert stuck.state == "parked"


def changed(**values: Any) -> Any:
    config = llm_args()
    vars(config).update(values)
    return config


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (llm_args(enable_partial_reuse=True), "set kv_cache_config.enable_partial_reuse to false"),
        (llm_args(enable_block_reuse=False), "set kv_cache_config.enable_block_reuse to true"),
        (llm_args(host_cache_size=1 << 30), "host_cache_size to 0"),
        (llm_args(max_attention_window=[128]), "attention windows"),
        (llm_args(tokens_per_block=None), "how many tokens a block has"),
        (changed(speculative_config=object()), "speculative decoding"),
        (changed(sparse_attention_config=object()), "sparse attention"),
        (changed(enable_attention_dp=True), "attention data parallelism"),
        (changed(pipeline_parallel_size=2), "pipeline parallelism"),
        (changed(max_beam_width=4), "beam search"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_an_engine_that_cannot_be_served_runs_without_us_and_is_told_why_in_one_line(
    start: Start, config: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "flexkv"):
        executor = start(config=config)
    (line,) = [record.message for record in caplog.records if "not used" in record.message]
    assert why in line
    assert executor.run(PROMPT, new_tokens=3).loaded == 0


def test_it_is_switched_off_by_its_setting(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_FLEXKV", "0")
    assert start().run(PROMPT).loaded == 0


def test_other_weights_settings_or_models_have_other_keys(start: Start) -> None:
    start()
    from flexkv.integration.tensorrt_llm.engine import read

    first = read(llm_args()).fingerprint("")
    assert first == read(llm_args()).fingerprint("")
    assert first != read(llm_args()).fingerprint("team")
    others = [
        changed(model="org/other"),
        changed(revision="v2"),
        changed(quant_config={"quant_algo": "FP8"}),
        changed(tensor_parallel_size=2),
        llm_args(dtype="fp8"),
        llm_args(tokens_per_block=2 * BLOCK),
        changed(model=None),
        changed(model=None),  # nothing tells it from the one above
    ]
    assert len({first, *(read(other).fingerprint("") for other in others)}) == len(others) + 1


def test_the_module_of_the_package_has_the_classes(start: Start) -> None:
    start()
    import flexkv.integration.tensorrt_llm as package
    from flexkv.integration.tensorrt_llm import trtllm_adapter

    assert package.FlexKVSchedulerConnector is trtllm_adapter.FlexKVSchedulerConnector
    assert package.FlexKVWorkerConnector is trtllm_adapter.FlexKVWorkerConnector


def test_without_tensorrt_llm_the_import_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    for name in [name for name in sys.modules if "tensorrt_llm" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(ImportError, match="needs a TensorRT-LLM with KV cache connectors"):
        importlib.import_module("flexkv.integration.tensorrt_llm")


def test_the_classes_of_an_installed_tensorrt_llm_are_ours_to_derive_from() -> None:
    pytest.importorskip("tensorrt_llm")
    from flexkv.integration.tensorrt_llm import FlexKVSchedulerConnector, FlexKVWorkerConnector

    assert not FlexKVSchedulerConnector.__abstractmethods__
    assert not FlexKVWorkerConnector.__abstractmethods__
