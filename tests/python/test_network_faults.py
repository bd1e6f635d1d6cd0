"""A cluster of real daemons, each in a network namespace of its own, when the network, Redis, clocks or nodes fail.

In every test: what is loaded has the right bytes, every load ends in its time while the fault lasts (Engine.end_load
sees to both), and prompts are found again after the fault, within CONVERGENCE_SECONDS."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("flexkv._core")

from cluster_machines import NODE_TTL_SECONDS, Cluster, Machine, wait_until  # noqa: E402
from small_network import CUT, Weather  # noqa: E402

_FAR = Weather(delay_s=0.05)
_TRIALS = 4


@pytest.fixture
def cluster(
    clean_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(*names: str) -> Cluster:
        try:
            made.append(Cluster(tmp_path, monkeypatch, *names))
        except OSError as error:
            pytest.skip(f"needs network namespaces and TUN devices (root): {error}")
        return made[-1]

    yield make
    for one in made:
        one.close()


def loads_all(machine: Machine, *seeds: int) -> None:
    for seed in seeds:
        wait_until(lambda seed=seed: machine.engine.loads_all(seed))


def interrupted(
    a: Machine, b: Machine, seeds: range, signal_number: int, failures: tuple[str, ...], kept: int = 0
) -> bool:
    """`b` reads from `a`, to which the signal comes meanwhile. False: too late, `b` had all of it. `kept`: prompts that `a`
    has already."""
    for seed in seeds:
        a.engine.compute(seed)
    wait_until(lambda: b.knows(kept + len(seeds)))
    loads = [b.engine.begin_load(seed) for seed in seeds]
    wait_until(lambda: b.cluster["read"]["blocks"] > 0)
    a.send(signal_number)
    for load in loads:
        b.engine.end_load(load)
    return any(b.cluster["read"]["ended"].get(failure, 0) > 0 for failure in failures)


def test_the_owner_is_killed_while_it_is_read_from(cluster: Callable[..., Cluster]) -> None:
    made = cluster("a", "b")
    a, b = made.start()
    made.network.between("a", "b", _FAR)
    for trial in range(1, _TRIALS + 1):
        seeds = range(10 * trial, 10 * trial + 6)
        in_time = interrupted(a, b, seeds, signal.SIGKILL, ("unreachable",))
        # The same machine comes back, with nothing.
        a.start()
        if in_time:
            break
        wait_until(lambda: b.knows(0))
    else:
        pytest.fail("it was always killed too late to matter")
    for seed in seeds:
        a.engine.compute(seed)
    loads_all(b, *seeds)


def helper_of(machine: Machine) -> int:
    """The process in which it runs Mooncake."""
    assert machine.process is not None
    tasks = Path(f"/proc/{machine.process.pid}/task").iterdir()
    (pid,) = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return pid


@pytest.mark.skipif(find_spec("mooncake") is None, reason="scripts/setup --tests installs Mooncake")
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("whose", ["owner", "reader"])
def test_mooncakes_process_fails_while_reads_are_under_way(
    cluster: Callable[..., Cluster], whose: str, signal_number: int
) -> None:
    made = cluster("a", "b")
    a, b = made.start(**{name: {"FLEXKV_PEER_TRANSPORT": "mooncake"} for name in "ab"})
    wait_until(lambda: a.cluster["transport"] == b.cluster["transport"] == "mooncake")
    made.network.between("a", "b", _FAR)
    seeds = range(1, 7)
    for seed in seeds:
        a.engine.compute(seed)
    wait_until(lambda: b.knows(len(seeds)))
    loads = [b.engine.begin_load(seed) for seed in seeds]
    wait_until(lambda: b.cluster["read"]["one_sided_blocks"] > 0)
    victim = {"owner": a, "reader": b}[whose]
    before = helper_of(victim)
    os.kill(before, signal_number)
    for load in loads:
        b.engine.end_load(load)
    loads_all(b, *seeds)
    # One that is stopped and has nothing to read is not missed.
    if signal_number == signal.SIGKILL:
        wait_until(lambda: victim.cluster["transport"] == "mooncake" and helper_of(victim) != before)
    victim.send(signal.SIGKILL)
    wait_until(lambda: not is_running(before))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_packets_are_lost_delayed_and_mixed_up(cluster: Callable[..., Cluster]) -> None:
    made = cluster("a", "b")
    a, b = made.start()
    for pair in (("a", "b"), ("a", "redis"), ("b", "redis")):
        made.network.between(*pair, Weather(loss=0.03, delay_s=0.005, jitter_s=0.01))
    for seed in (1, 2, 3):
        a.engine.compute(seed)
    loads_all(b, 1, 2, 3)


def test_two_nodes_that_see_redis_but_not_each_other(cluster: Callable[..., Cluster]) -> None:
    made = cluster("a", "b", "c")
    a, b, c = made.start()
    only_a, both = range(1, 7), 7
    for seed in (*only_a, both):
        a.engine.compute(seed)
    loads_all(c, both)
    wait_until(lambda: b.knows(len(only_a) + 2))
    made.network.between("a", "b", CUT)
    loads = [b.engine.begin_load(seed) for seed in only_a]
    assert [b.engine.end_load(load) for load in loads] == [0] * len(loads)
    loads_all(b, both)
    wait_until(lambda: (a.peers(), b.peers(), b.cluster["directory"]["trouble"]) == (["b", "c"], ["a", "c"], ""))
    made.network.heal()
    loads_all(b, *only_a)


def test_a_node_that_does_not_see_redis(cluster: Callable[..., Cluster]) -> None:
    made = cluster("a", "b")
    a, b = made.start()
    a.engine.compute(1)
    loads_all(b, 1)
    made.network.between("b", "redis", CUT)
    b.engine.compute(2)
    wait_until(lambda: (a.peers(), b.peers()) == ([], []))
    a.engine.compute(3)
    assert (b.engine.load(3), a.engine.load(2)) == (0, 0)
    loads_all(b, 1)
    made.network.heal()
    loads_all(b, 3)
    loads_all(a, 2)


def test_redis_is_killed_and_comes_back_empty(cluster: Callable[..., Cluster]) -> None:
    made = cluster("a", "b")
    a, b = made.start()
    a.engine.compute(1)
    loads_all(b, 1)
    made.redis.kill()
    loads_all(b, 1)
    a.engine.compute(2)
    b.engine.compute(3)
    made.redis.start()
    loads_all(b, 2)
    loads_all(a, 3)


def test_two_nodes_with_one_name(cluster: Callable[..., Cluster]) -> None:
    made = cluster("a", "b", "c")
    same = {"FLEXKV_NODE_ID": "same"}
    a, b, c = made.start(a=same, b={}, c=same)
    assert b.peers() == ["same", "same"]
    a.engine.compute(1)
    c.engine.compute(2)
    loads_all(b, 1, 2)
    loads_all(a, 2)
    c.engine.compute(3)
    a.send(signal.SIGKILL)
    loads_all(b, 3)
    wait_until(lambda: b.peers() == ["same"])


def test_the_owner_stops_for_longer_than_loads_may_take(cluster: Callable[..., Cluster]) -> None:
    made = cluster("a", "b")
    a, b = made.start()
    made.network.between("a", "b", _FAR)
    for trial in range(_TRIALS):
        seeds = range(10 * trial, 10 * trial + 4)
        if interrupted(a, b, seeds, signal.SIGSTOP, ("deadline", "canceled"), kept=4 * trial):
            break
        a.send(signal.SIGCONT)
    else:
        pytest.fail("it was always stopped too late to matter")
    wait_until(lambda: b.peers() == [])
    a.send(signal.SIGCONT)
    loads_all(b, *seeds)


def test_clocks_jump(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path / "jumping_clock.so"
    source = Path(__file__).with_name("jumping_clock.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    clocks = {name: tmp_path / f"clock of {name}" for name in ("redis", "a", "b")}

    def jump(name: str, days: int) -> None:
        with clocks[name].open("r+b" if clocks[name].exists() else "wb") as clock:
            clock.write(struct.pack("=q", days * 86_400))

    for name in clocks:
        jump(name, 0)
    made = cluster("a", "b")
    a, b = made.start(
        **{name: {"LD_PRELOAD": str(library), "JUMPING_CLOCK": str(clock)} for name, clock in clocks.items()}
    )
    a.engine.compute(1)
    loads_all(b, 1)
    # Forwards at Redis: whatever has a time to live there is gone at once.
    for seed, (name, days) in enumerate([("redis", 1), ("a", 2), ("b", -1), ("redis", -3), ("a", -5)], start=2):
        jump(name, days)
        a.engine.compute(seed)
        loads_all(b, seed)
    # And backwards: what a node that is gone has written there would live for days.
    a.send(signal.SIGKILL)
    jump("redis", -4)
    wait_until(lambda: b.peers() == [])
    gone_until = time.monotonic() + NODE_TTL_SECONDS
    while time.monotonic() < gone_until:
        assert b.peers() == [], "its last heartbeat is still at Redis, and brought it back"
        time.sleep(0.1)
    loads_all(b, 1)
