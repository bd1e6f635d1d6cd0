"""NVIDIA Dynamo, unmodified, on CPUs: its frontend with the KV router and two vLLM workers that share one FlexKV node; once
with files and ZeroMQ between them, once with etcd and NATS.

What has to be shown: requests go where their prefix is, what a worker's own cache lost or never had comes from FlexKV, the
tokens are those of a vLLM without FlexKV, what only FlexKV keeps attracts requests, and a worker that dies is missed by nobody."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from dynamo import FLEXKV, PYTHON, SERVERS, Answer, Deployment, Hits, Worker
from engine import EngineConfig, run_engine
from scenarios import ANSWER, LONG, SHARED, WHOLE_POOL, generate, prompt, whole_blocks

pytestmark = pytest.mark.skipif(
    not Path(PYTHON).is_file(), reason=f"no environment with Dynamo at {PYTHON}: scripts/setup --tests makes it"
)

PREFIXES = [prompt(f"dynamo {which}", SHARED) for which in ("one", "other")]
ENDS = [prompt(f"dynamo end {i}", 40) for i in range(4)]
EVICTED = prompt("dynamo evicted", LONG)
ATTRACTS = prompt("dynamo attracts", LONG)
SURVIVES = prompt("dynamo survives", LONG)
# The router chooses by chance between workers that are alike to it: so often in a row it does not.
NO_CHANCE = 30


@dataclasses.dataclass(frozen=True)
class Service:
    deployment: Deployment
    workers: list[Worker]
    ids: list[int]

    def ask(self, tokens: list[int], worker: int | None = None) -> Answer:
        """`worker`: which of `workers`."""
        return self.deployment.ask(tokens, ANSWER, None if worker is None else self.ids[worker])

    def hits_of(self, tokens: list[int], worker: int) -> tuple[Answer, Hits]:
        before = self.workers[worker].hits
        answer = self.ask(tokens, worker)
        return answer, self.workers[worker].hits - before

    def evict_all(self, worker: int) -> None:
        """Two prompts, each nearly as large as the worker's own cache, leave nothing of what was in it before."""
        for i in range(2):
            self.ask(prompt(f"filler {i}", WHOLE_POOL), worker)

    def wait_until_foreseen(self, tokens: list[int], worker: int) -> None:
        """Until the router knows that the worker has them, which has served them before."""
        self.deployment.wait_until(lambda: self.ask(tokens, worker).foreseen > 0)


_MISSING = [name for name, path in SERVERS.items() if path is None]
_ETCD_AND_NATS = pytest.param(
    "etcd and nats",
    marks=pytest.mark.skipif(
        bool(_MISSING), reason=f"no {' and no '.join(_MISSING)}: apt-get install etcd-server nats-server"
    ),
)


@pytest.fixture(scope="module", params=["files and zmq", _ETCD_AND_NATS])
def service(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    with Deployment(tmp_path_factory.mktemp("dynamo")) as deployment:
        if request.param == "etcd and nats":
            deployment.start_etcd_and_nats()
        deployment.start_node()
        deployment.start_frontend("--router-mode", "kv", "--migration-limit", "3")
        workers: list[Worker] = []
        # The second one keeps and loads all the same, but does not tell the router.
        for tells in ("1", "0"):
            workers.append(
                deployment.start_worker(f"worker{len(workers)}", tiny_model, FLEXKV, DYNAMO_USE_FLEXKV=tells)
            )
            # One after the other: once, of two that began together, one hung in its imports, before any line of ours.
            deployment.wait_until_ready(*workers)
        yield Service(deployment, workers, [worker.id for worker in workers])


@pytest.fixture(scope="module")
def expected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """What the same vLLM says to the prompts without FlexKV and without Dynamo."""
    steps = [generate(f"end {i}", [prefix + end for prefix in PREFIXES]) for i, end in enumerate(ENDS)]
    steps += [generate("evicted", [EVICTED]), generate("attracts", [ATTRACTS]), generate("survives", [SURVIVES])]
    directory = tmp_path_factory.mktemp("plain") / "engine"
    results = run_engine(EngineConfig(flexkv=False), tiny_model, steps, directory, python=PYTHON)
    return {name: result.outputs for name, result in results.items()}


def test_requests_go_to_the_worker_that_has_their_prefix(
    service: Service, expected: dict[str, list[list[int]]]
) -> None:
    for worker, prefix in enumerate(PREFIXES):
        assert service.ask(prefix + ENDS[0], worker).cached == 0
        service.wait_until_foreseen(prefix + ENDS[0], worker)
    for i, end in enumerate(ENDS):
        answers = [service.ask(prefix + end) for prefix in PREFIXES]
        assert [answer.worker for answer in answers] == service.ids
        assert all(answer.cached >= whole_blocks(SHARED) for answer in answers)
        assert [answer.tokens for answer in answers] == expected[f"end {i}"]


def test_what_a_worker_evicted_or_never_had_comes_from_flexkv(
    service: Service, expected: dict[str, list[list[int]]]
) -> None:
    cold, hits = service.hits_of(EVICTED, 0)
    assert cold.tokens == expected["evicted"][0] and hits == Hits(0, 0)
    service.evict_all(0)
    for worker in range(2):
        warm, hits = service.hits_of(EVICTED, worker)
        assert warm.tokens == expected["evicted"][0]
        assert hits == Hits(own=0, flexkv=whole_blocks(LONG))


def test_what_only_flexkv_keeps_attracts_requests(service: Service, expected: dict[str, list[list[int]]]) -> None:
    for worker in range(2):
        assert service.ask(ATTRACTS, worker).tokens == expected["attracts"][0]
        service.evict_all(worker)
    # To the router both are alike by what their own caches have; only the first one told it what FlexKV keeps.
    service.deployment.wait_until(
        lambda: {service.deployment.chosen(ATTRACTS) for _ in range(NO_CHANCE)} == {service.ids[0]}
    )
    before = service.workers[0].hits
    assert service.ask(ATTRACTS).tokens == expected["attracts"][0]
    assert service.workers[0].hits - before == Hits(own=0, flexkv=whole_blocks(LONG))


def test_when_a_worker_dies_the_other_goes_on_with_what_it_kept(
    service: Service, expected: dict[str, list[list[int]]]
) -> None:
    """Last in this file: afterwards there is one worker."""
    assert service.ask(SURVIVES, 1).tokens == expected["survives"][0]
    service.wait_until_foreseen(SURVIVES, 1)
    before = service.workers[0].hits
    service.workers[1].kill()
    for _ in range(3):
        # The router believes that the dead worker has it, and is told better by trying.
        assert service.ask(SURVIVES).tokens == expected["survives"][0]
    assert service.workers[0].hits - before == Hits(own=2 * whole_blocks(LONG), flexkv=whole_blocks(LONG))
    service.deployment.wait_until(lambda: len(service.deployment.node_status()["engines"]) == 1)
    # What Dynamo says of events that its router cannot use.
    assert not service.deployment.lines_with("not published")
