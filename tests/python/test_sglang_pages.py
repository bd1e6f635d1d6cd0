"""Pages named by their hashes, in a pool of real tensors, over a real node: what SGLang's better doors rest on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
_core = pytest.importorskip("flexkv._core")

from flexkv.config import load  # noqa: E402
from flexkv.integration.sglang.chains import PageChains  # noqa: E402
from flexkv.integration.sglang.layers import Batch, LayerCounter, Streams  # noqa: E402
from flexkv.integration.sglang.pages import NodePlace, PageStore, open_agent  # noqa: E402
from flexkv.integration.sglang.pools import Pool, block_numbers  # noqa: E402

pytestmark = pytest.mark.usefixtures("clean_environment")

BLOCKS, LAYERS, ELEMENTS = 64, 3, 8
_PATIENCE_SECONDS = 60


def pages(count: int, seed: str = "") -> list[bytes]:
    return [hashlib.sha256(f"{seed}{number}".encode()).digest() for number in range(count)]


class Engine:
    def __init__(self, name: str) -> None:
        self.tensors = [torch.zeros(BLOCKS, ELEMENTS, dtype=torch.int64) for _ in range(LAYERS)]
        described = [
            {
                "name": str(layer),
                "address": tensor.data_ptr(),
                "element_bytes": 8,
                "shape": list(tensor.shape),
                "stride": list(tensor.stride()),
                "block_axis": 0,
            }
            for layer, tensor in enumerate(self.tensors)
        ]
        pool = Pool("kv", 1, BLOCKS, "host", described, list(range(LAYERS)))
        place = NodePlace(os.environ["FLEXKV_RUNTIME_DIR"], "node", name)
        client = _core.Client.remote(place.runtime_dir, place.node_name, name, 1, "model", bytes(32), 1)
        self.store = PageStore(client, open_agent(place, pool, load()), pool)
        assert self.store.agent.wait_attached(_PATIENCE_SECONDS)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not client.served(0.01):
            assert time.monotonic() < deadline

    def save(self, names: list[bytes], first_block: int = 0) -> int:
        """How many blocks were copied."""
        blocks = list(range(first_block, first_block + len(names)))
        for name, block in zip(names, blocks, strict=True):
            for layer, tensor in enumerate(self.tensors):
                tensor[block] = _content(name) + layer
        before = self.store.agent.counters()["saved_blocks"]
        jobs, reached = self.store.save(names, blocks)
        assert reached
        self.store.agent.arm_saves(jobs, 0)
        left = set(jobs)
        while left:
            assert self.store.client.wait_ended_jobs(_PATIENCE_SECONDS)
            for job, problem in self.store.client.take_ended_jobs():
                assert not problem
                left.discard(job)
        return self.store.agent.counters()["saved_blocks"] - before

    def load(self, names: list[bytes]) -> int:
        """How many leading pages were found; loaded, and checked layer by layer."""
        for tensor in self.tensors:
            tensor.zero_()
        count, pieces = self.store.find(names)
        blocks = [BLOCKS - 1 - number for number in range(count)]
        counter = LayerCounter(LAYERS, Streams(None))
        jobs = self.store.load(pieces, blocks)
        index = counter.begin([Batch(self.store, jobs)] if jobs else [])
        counter.set_consumer(index)
        for layer, tensor in enumerate(self.tensors):
            counter.wait_until(layer)
            for name, block in zip(names, blocks, strict=False):
                assert bool((tensor[block] == _content(name) + layer).all())
        assert counter.finish(index)
        self.store.close(pieces)
        return count

    def close(self) -> None:
        self.store.stop()
        self.store.client.close()


def _content(name: bytes) -> int:
    return int.from_bytes(name[:6], "little")


@pytest.fixture
def engine() -> Iterator[Engine]:
    with node(), opened("one") as one:
        yield one


@contextlib.contextmanager
def node() -> Iterator[None]:
    running = _core.Node({"pool_bytes": 4 << 20})
    running.listen(os.environ["FLEXKV_RUNTIME_DIR"], "node")
    try:
        yield
    finally:
        running.stop()


@contextlib.contextmanager
def opened(name: str) -> Iterator[Engine]:
    engine = Engine(name)
    try:
        yield engine
    finally:
        engine.close()


def test_pages_are_found_from_wherever_they_are_asked_for(engine: Engine) -> None:
    names = pages(10)
    assert engine.save(names) == 10
    for first in range(10):
        assert engine.load(names[first:]) == 10 - first
    assert engine.load(pages(1, "other") + names) == 0
    assert engine.load(names[:4] + pages(2, "other")) == 4


def test_pieces_that_were_kept_apart_are_found_as_one_and_not_kept_again(engine: Engine) -> None:
    names = pages(12)
    assert engine.save(names[8:]) == 4
    assert engine.save(names[:3]) == 3
    assert engine.load(names) == 3
    assert engine.save(names) == 5  # what lies between
    assert engine.load(names) == 12
    assert engine.save(names) == 0


def test_what_follows_kept_pages_is_kept_behind_them(engine: Engine) -> None:
    """So it is evicted before them."""
    names = pages(6)
    engine.save(names[:3])
    engine.save(names)
    assert engine.store._chains.before(names[5]) == names[:5]


def test_what_was_forgotten_and_kept_by_itself_since_is_found() -> None:
    names = pages(8)
    with node(), opened("one") as one, opened("two") as two:
        one.save(names)
        _core.reset(os.path.join(os.environ["FLEXKV_RUNTIME_DIR"], "node.sock"))
        assert one.load(names) == 0
        two.save(names[5:])
        assert one.load(names[5:]) == 3


def test_pages_with_gaps_are_found_one_by_one(engine: Engine) -> None:
    names = pages(9)
    engine.save(names[2:4])
    engine.save(names[6:7])
    found, pieces = engine.store.find_scattered(names)
    engine.store.close(pieces)
    assert found == {2, 3, 6}


def test_pages_that_were_kept_one_by_one_are_found_with_few_questions(engine: Engine) -> None:
    names = pages(200)
    for number in (40, 41, 120):
        engine.save(names[number : number + 1])
    asked = []

    class Asking:
        def lookup_last(self, sequence: int, hashes: list[bytes]) -> Any:
            asked.append(len(hashes))
            return client.lookup_last(sequence, hashes)

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

    client, engine.store.client = engine.store.client, Asking()
    found, pieces = engine.store.find_alone(names)
    engine.store.client = client
    assert found == {40, 41, 120} and asked == [200, 120, 41, 40]
    by_page = {names[piece.at]: piece for piece in pieces}
    jobs = engine.store.load([by_page[names[41]]._replace(at=0)], [7])
    engine.store.agent.arm_loads(jobs, 0)
    assert engine.store.agent.wait_loads(jobs) == []
    assert [int(tensor[7][0]) for tensor in engine.tensors] == [_content(names[41]) + layer for layer in range(LAYERS)]
    engine.store.close(pieces)


def test_another_engine_learns_from_whole_chains_what_is_kept_behind_what() -> None:
    names = pages(8)
    with node(), opened("one") as one, opened("two") as two:
        one.save(names)
        assert two.load(names[5:]) == 0  # nobody told it what comes before
        assert two.load(names) == 8
        assert two.load(names[5:]) == 3


def test_a_load_that_no_layer_asks_for_is_not_trusted(engine: Engine) -> None:
    names = pages(4)
    engine.save(names)
    counter = LayerCounter(LAYERS, Streams(None))

    def load_without_asking() -> bool:
        _, pieces = engine.store.find(names)
        index = counter.begin([Batch(engine.store, engine.store.load(pieces, list(range(10, 14))))])
        counter.set_consumer(index)
        ok = counter.finish(index)
        engine.store.close(pieces)
        return ok

    assert not load_without_asking()
    assert load_without_asking()  # from then on the forward waits for all layers at its beginning


def test_chains_branch_grow_and_are_forgotten() -> None:
    chains = PageChains(pages_max=6)
    names = pages(4)
    chains.add(names[:2], 0)
    chains.add(names, 2)
    branch = pages(1, "branch")
    chains.add(names[:2] + branch, 2)
    assert chains.before(names[3]) == names[:3]
    assert chains.before(branch[0]) == names[:2]
    assert chains.before(names[0]) == chains.before(b"never seen") == []
    chains.add(pages(2, "more"), 0)
    assert names[0] not in chains and chains.before(names[3]) == names[:3]


def test_slots_that_are_no_whole_blocks_are_told() -> None:
    pool = Pool("kv", 4, 8, "host", [], [])
    assert block_numbers(torch.tensor([8, 9, 10, 11, 0, 1, 2, 3]), pool) == [2, 0]
    for wrong in ([8, 9, 10], [8, 9, 10, 12], [9, 10, 11, 12]):
        with pytest.raises(ValueError, match="kv"):
            block_numbers(torch.tensor(wrong), pool)
