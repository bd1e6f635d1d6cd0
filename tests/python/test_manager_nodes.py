"""Whose node a manager uses: its own, that of another data-parallel rank, or a daemon's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("flexkv._core")

from flexkv.common.config import CacheConfig  # noqa: E402
from flexkv.common.request import KVResponseStatus  # noqa: E402
from flexkv.kvmanager import KVManager  # noqa: E402
from manager_ranks import TOKENS, Shape, model, ranks, slots, started, tokens, wait_ready  # noqa: E402
from ssd_damage import damage_block  # noqa: E402

SUCCESS = KVResponseStatus.SUCCESS


@pytest.fixture(autouse=True)
def _small_pool(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "16MB")


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


@pytest.mark.parametrize("beyond", ["nothing", "drives", "cluster", "daemon"])
def test_models_that_are_not_named_share_nothing_beyond_their_process(
    beyond: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variables = {
        "nothing": {},
        "drives": {"FLEXKV_SSD_CACHE_GB": "16MB", "FLEXKV_SSD_CACHE_DIR": str(tmp_path)},
        "cluster": {"FLEXKV_ENABLE_P2P_CPU": "1", "FLEXKV_CLUSTER_SECRET_FILE": str(tmp_path / "secret")},
        "daemon": {"FLEXKV_SERVER_LAUNCH_MODE": "external"},
    }[beyond]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def fingerprint(**named: str) -> bytes:
        return KVManager(model(**named), CacheConfig())._fingerprint()

    assert (fingerprint() == fingerprint()) == (beyond == "nothing")
    assert fingerprint(identity="weights") == fingerprint(identity="weights")


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


def test_a_get_that_meets_a_damaged_block_says_what_was_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLEXKV_SSD_CACHE_GB", "16MB")
    (tmp_path / "ssd").mkdir()
    monkeypatch.setenv("FLEXKV_SSD_CACHE_DIR", str(tmp_path / "ssd"))
    monkeypatch.setenv("FLEXKV_SSD_ADMISSION", "0")
    prompt = tokens(5 * TOKENS)
    source, target = [0, 1, 2, 3, 4], [10, 11, 12, 13, 14]
    named = model(tp_size=2, identity="model and weights")
    clients = [{"intra_client_id": rank} for rank in range(2)]
    with started(named) as manager, ranks(manager.gpu_register_port, Shape("sglang"), clients) as group:
        wait_ready(manager)
        group.ask("fill", source)
        written = group.ask("read", source)
        task = manager.put_async(prompt, slots(source))
        assert manager.wait(task)[task].status is SUCCESS
    damage_block(tmp_path / "ssd", 3)
    with started(named) as manager, ranks(manager.gpu_register_port, Shape("sglang"), clients) as group:
        wait_ready(manager)
        deadline = time.monotonic() + 60
        while not (found := manager.get_match(prompt))[1].all():  # until the drive has been read
            manager.cancel(found[0])
            assert time.monotonic() < deadline
        task = found[0]
        manager.launch(task, [slots(target)])
        response = manager.wait(task)[task]
        assert (response.status, response.reason) == (KVResponseStatus.FAILED, "checksum")
        assert response.return_mask.tolist() == [True] * 3 * TOKENS + [False] * 2 * TOKENS
        assert group.ask("read", target[:3]) == [blocks[:3] for blocks in written]

        group.ask("clear")
        task, mask = manager.get_match(prompt)
        assert mask.tolist() == response.return_mask.tolist()
        manager.launch(task, [slots(target[:3])])
        assert manager.wait(task)[task].status is SUCCESS
        assert group.ask("read", target[:3]) == [blocks[:3] for blocks in written]


def test_a_stalled_daemon_that_cannot_hear_a_cancel_has_no_task_end_before_its_copies(
    monkeypatch: pytest.MonkeyPatch, daemon: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setenv("FLEXKV_SERVER_LAUNCH_MODE", "external")
    with started(model()) as manager, ranks(manager.gpu_register_port, Shape("vllm"), [{}]) as _group:
        wait_ready(manager)
        daemon.send_signal(signal.SIGSTOP)
        os.waitpid(daemon.pid, os.WUNTRACED)  # all its threads have stopped
        try:
            task = manager.put_async(tokens(TOKENS), slots([0]))
            # More than the way to the daemon holds: first orders, then what fits behind the last of them.
            for seed in range(1, 61):
                manager.put_async(tokens(4000 * TOKENS, seed), slots([0] * 4000))
            for _ in range(8000):
                manager.cancel(task)
            assert manager.wait(task, timeout=1.5)[task].status is KVResponseStatus.TIMEOUT
        finally:
            daemon.send_signal(signal.SIGCONT)
        assert manager.wait(task)[task].status is KVResponseStatus.CANCELLED


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
