"""What `flexkv doctor` says of host memory, limits and the runtime directory, with the real core."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flexkv.config import Settings, load
from flexkv.config.sizes import GIB, MIB, HostMemory
from flexkv.doctor import host
from flexkv.doctor.finding import Verdict

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture
def core() -> Any:
    return pytest.importorskip("flexkv._core")


def settings(**given: object) -> Settings:
    return load(extra=given, extra_origin="test")


@contextmanager
def limit(what: int, soft: int) -> Iterator[None]:
    before, hard = resource.getrlimit(what)
    resource.setrlimit(what, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (before, hard))


# ---- the pool


@pytest.mark.parametrize(
    ("given", "available", "held", "verdict"),
    [
        ({"cpu_cache_gb": 8}, 8, 0, Verdict.OK),
        ({"cpu_cache_gb": 8}, 7, 0, Verdict.WRONG),
        ({"cpu_cache_gb": 8}, 1, 7, Verdict.OK),  # a node that runs has taken it
        ({}, 15, 0, Verdict.BETTER),  # nobody asked for 16 GiB
        ({"cpu_cache_gb": 16}, 15, 0, Verdict.WRONG),
    ],
)
def test_room_for_the_pool(given: dict[str, object], available: int, held: int, verdict: Verdict) -> None:
    found = host.room_for_pool(settings(**given), HostMemory(available * GIB, "available on the machine"), held * GIB)
    assert found.verdict is verdict
    assert f"{available} GiB available on the machine" in found.found
    assert bool(found.advice) == (verdict is not Verdict.OK)


def test_the_pools_of_nodes_that_run_are_held(core: Any) -> None:
    directory = os.environ["FLEXKV_RUNTIME_DIR"]
    assert host.bytes_held(core, directory) == 0
    node = core.Node({"pool_bytes": 64 * MIB, "mode": "daemon", "log_level": "error"})
    node.listen(directory, "running")
    try:
        assert host.bytes_held(core, directory) == 64 * MIB
    finally:
        node.stop()
    (Path(directory) / "dead.sock").touch()
    assert host.bytes_held(core, directory) == 0


def test_pages_are_those_that_a_pool_gets(core: Any) -> None:
    found = host.pages(settings(), core)
    joined = "100 % joined to 2 MiB" in found.found
    assert found.found.startswith("4 KiB pages")
    assert found.verdict is (Verdict.OK if joined else Verdict.BETTER)


def test_huge_pages_that_are_missing(core: Any, tmp_path: Path) -> None:
    place = tmp_path / "kernel/mm/hugepages/hugepages-2048kB"
    place.mkdir(parents=True)
    wants = settings(cpu_cache_gb=1, use_hugepage_cpu_buffer=True)
    (place / "free_hugepages").write_text("511\n")
    found = host.pages(wants, core, tmp_path)
    assert found.verdict is Verdict.BETTER
    assert "511 of 512 huge pages are free" in found.found
    assert found.advice == "reserve pages: sysctl vm.nr_hugepages=512 for 1 GiB"
    (place / "free_hugepages").write_text("512\n")
    assert host.pages(wants, core, tmp_path).verdict is Verdict.OK


def test_a_limit_on_files_holds_for_the_pool(core: Any) -> None:
    small = settings(cpu_cache_gb="32MB")
    with limit(resource.RLIMIT_FSIZE, 32 * MIB):
        assert host.file_size_limit(small).verdict is Verdict.OK
        found = host.file_size_limit(settings(cpu_cache_gb=1))
        assert (found.verdict, found.found) == (Verdict.WRONG, "32 MiB; the pool, or the share of a drive, has 1 GiB")
        assert host.file_size_limit(settings(cpu_cache_gb="32MB", ssd_cache_gb="33MB")).verdict is Verdict.WRONG
        two = settings(cpu_cache_gb="32MB", ssd_cache_gb="64MB", ssd_cache_dir="/a;/b")
        assert host.file_size_limit(two).verdict is Verdict.OK
        refused = host.pages(small, core)  # the core, too, cannot make a larger one
        assert refused.verdict is Verdict.WRONG
        assert "File too large" in refused.found


# ---- io_uring


def test_io_uring_as_the_drives_get_it(core: Any) -> None:
    found = host.io_uring(core)
    assert found.verdict is (Verdict.OK if found.found.startswith("io_uring") else Verdict.BETTER)


def test_without_io_uring_threads_do_it(core: Any, tmp_path: Path) -> None:
    lowest = os.dup(0)
    os.close(lowest)
    with limit(resource.RLIMIT_NOFILE, lowest + 1):  # enough for the event, not for the ring
        found = host.io_uring(core, tmp_path)
    assert found.verdict is Verdict.BETTER
    assert found.found == "no io_uring: Too many open files; drives are read and written by threads instead"
    assert "seccomp" in found.advice
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/io_uring_disabled").write_text("2\n")
    with limit(resource.RLIMIT_NOFILE, lowest + 1):
        assert host.io_uring(core, tmp_path).advice == "sysctl kernel.io_uring_disabled=0"


# ---- locked memory


def test_locked_memory_is_for_the_ssd_tier(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    status = tmp_path / "self/status"
    status.write_text("Name:\tx\nCapEff:\t0000000000000000\n")
    one = settings(cpu_cache_gb="2MB", ssd_cache_gb=1, ssd_cache_dir="/a")
    two = settings(cpu_cache_gb="2MB", ssd_cache_gb=1, ssd_cache_dir="/a;/b")
    with limit(resource.RLIMIT_MEMLOCK, 2 * MIB):
        assert host.locked_memory(settings(cpu_cache_gb=1), tmp_path).verdict is Verdict.OK
        assert host.locked_memory(one, tmp_path).verdict is Verdict.OK
        found = host.locked_memory(two, tmp_path)
        assert found.verdict is Verdict.BETTER
        assert found.found.startswith("2 MiB; 4 MiB to register")
        status.write_text("Name:\tx\nCapEff:\t0000000000004000\n")
        assert host.locked_memory(two, tmp_path).verdict is Verdict.OK


# ---- the runtime directory


def test_a_runtime_directory_that_can_be_used(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    assert host.runtime_dir(settings(runtime_dir=str(private))).verdict is Verdict.OK
    found = host.runtime_dir(settings(runtime_dir=str(tmp_path / "new")))
    assert found.verdict is Verdict.OK
    assert "can be made" in found.found
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["open", "file", "link", "no parent"])
def test_a_runtime_directory_that_the_core_refuses(what: str, tmp_path: Path, core: Any) -> None:
    path = tmp_path / "run dir"
    if what == "open":
        path.mkdir()
        path.chmod(0o750)
    elif what == "file":
        path.touch()
    elif what == "link":
        (tmp_path / "target").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "target")
    else:
        path = tmp_path / "none" / "below"
    found = host.runtime_dir(settings(runtime_dir=str(path), node="default"))
    assert found.verdict is Verdict.WRONG
    assert found.advice
    if what == "open":
        assert found.advice == f"chmod 700 {path}"
    node = core.Node({"pool_bytes": 2 * MIB, "mode": "daemon", "log_level": "error"})
    with pytest.raises((RuntimeError, ValueError)):
        node.listen(str(path), "default")
