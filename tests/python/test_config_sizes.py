from pathlib import Path

import pytest
from flexkv.config.sizes import (
    GIB,
    KIB,
    MIB,
    TIB,
    HostMemory,
    auto_cache_size,
    format_size,
    parse_size,
    read_host_memory,
)
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (16, 16 * GIB),
        (0.5, GIB // 2),
        ("16", 16 * GIB),
        ("16GB", 16 * GIB),
        ("16 GiB", 16 * GIB),
        ("16g", 16 * GIB),
        ("1.5T", 3 * TIB // 2),
        (" 512MB ", 512 * MIB),
        ("512mib", 512 * MIB),
        ("4k", 4 * KIB),
        ("17179869184B", 16 * GIB),
        ("0.25", GIB // 4),
    ],
)
def test_sizes_as_people_write_them(written: object, size: int) -> None:
    assert parse_size(written, GIB) == size


@pytest.mark.parametrize(
    "written",
    [
        *(
            "",
            "GB",
            "-1",
            "1e3",
            "1,5",
            "1.5.2",
            "12x",
            "16 G B",
            "\N{FULLWIDTH DIGIT ONE}",
            "nan",
            "inf",
            "0x10",
            "1_000",
        ),
        *("9" * 30, True, None, [16], float("nan"), float("inf"), 1e308),
    ],
)
def test_what_is_no_size(written: object) -> None:
    with pytest.raises(ValueError):
        parse_size(written, GIB)


def test_a_bare_number_counts_the_given_unit() -> None:
    assert parse_size("4", MIB) == 4 * MIB
    assert parse_size(2 * MIB, 1) == 2 * MIB


@given(st.integers(0, 1 << 50))
def test_bytes_survive(size: int) -> None:
    assert parse_size(f"{size}B", GIB) == size
    # Printed with two decimals: within half a hundredth of the unit, which is at most 1 % of the size.
    assert parse_size(format_size(size), 1) == pytest.approx(size, rel=0.01)


def test_format() -> None:
    assert [format_size(one) for one in (0, 1023, 1536, 16 * GIB, 3 * TIB // 2)] == [
        "0 B", "1023 B", "1.5 KiB", "16 GiB", "1.5 TiB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("available", "cache"),
    [(0, 1), (1, 1), (4, 1), (8, 3), (20, 8), (30, 16), (110, 80), (1034, 819)],
)
def test_auto_leaves_a_reserve_and_is_never_less_than_one(available: int, cache: int) -> None:
    size = auto_cache_size(HostMemory(available * GIB, "available"))
    assert size == cache * GIB
    assert "0.8" in size.reason


@given(st.integers(0, 1 << 50))
def test_auto_never_exceeds_its_share(available: int) -> None:
    size = auto_cache_size(HostMemory(available, "available"))
    assert size % GIB == 0
    assert GIB <= size <= max(GIB, available * 0.8)


class Machine:
    """Files as the kernel shows them, in a folder."""

    def __init__(self, root: Path, available_gib: int, membership: str) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 999999999 kB\nMemAvailable:   {available_gib * GIB // KIB} kB\n")
        self.write("proc/self/cgroup", membership)

    def write(self, name: str, content: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def available(self) -> int:
        return read_host_memory(self.root / "proc", self.root / "cgroup").available


def test_without_a_limit_the_machine_decides(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 100, "0::/a\n")
    machine.write("cgroup/a/memory.max", "max\n")
    assert machine.available() == 100 * GIB


def test_version_2_limit_of_an_ancestor(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 100, "0::/a/b\n")
    machine.write("cgroup/a/memory.max", f"{30 * GIB}\n")
    machine.write("cgroup/a/memory.current", f"{12 * GIB}\n")
    machine.write("cgroup/a/memory.stat", f"anon 5\nfile 9\ninactive_file {2 * GIB}\n")
    machine.write("cgroup/a/b/memory.max", "max\n")
    assert machine.available() == 20 * GIB


def test_version_1_limit_in_a_container(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 100, "5:cpu:/x\n4:memory:/outside/of/us\n0::/\n")
    machine.write("cgroup/memory/memory.limit_in_bytes", f"{40 * GIB}\n")
    machine.write("cgroup/memory/memory.usage_in_bytes", f"{10 * GIB}\n")
    machine.write("cgroup/memory/memory.stat", "total_inactive_file 0\n")
    assert machine.available() == 30 * GIB


def test_usage_beyond_the_limit_is_no_room(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 100, "0::/\n")
    machine.write("cgroup/memory.max", "1000\n")
    machine.write("cgroup/memory.current", "2000\n")
    assert machine.available() == 0


def test_this_machine() -> None:
    assert read_host_memory().available > 0
