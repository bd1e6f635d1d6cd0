import contextlib
import io
import json
import logging
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import fake_core
import pytest
from flexkv.cli.app import app
from flexkv.cli.drive_tables import drive_lines
from flexkv.cli.status_tables import node_view
from flexkv.cli.versions import package_version
from flexkv.config.reference import reference_page
from flexkv.config.sizes import HostMemory
from typer.testing import CliRunner, Result

from flexkv import node_start

pytestmark = pytest.mark.usefixtures("clean_environment")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.setitem(sys.modules, "flexkv._core", fake_core)
    return fake_core


@pytest.fixture
def no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flexkv._core", None)  # type: ignore[arg-type]


def runtime_dir() -> Path:
    return Path(os.environ["FLEXKV_RUNTIME_DIR"])


@pytest.fixture
def node(core: types.ModuleType) -> Any:
    started = fake_core.Node({"pool_bytes": 1 << 34})
    started.listen(str(runtime_dir()), "default")
    yield started
    started.stop()


# ---- help and version


@pytest.mark.parametrize("command", [[], ["version"], ["serve"], ["status"], ["config"], ["config", "show"]])
def test_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("command", [["serve"], ["status"], ["config", "show"]])
def test_help_has_examples(command: list[str]) -> None:
    assert "flexkv " + " ".join(command) + " -" in run(*command, "--help").output


def test_wrong_usage() -> None:
    assert run("serve", "--no-such-option").exit_code == 2
    assert run("nonsense").exit_code == 2
    assert run("status", "--watch", "0").exit_code == 2


def test_version_option() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"flexkv {package_version()}\n")


def test_version(core: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so"
    library.touch()
    monkeypatch.setenv("FLEXKV_CUDA_LIBRARY", str(library))
    answer = json.loads(run("version", "--json").stdout)
    assert answer["core"] == {"present": True, "compiler": "none"}
    assert answer["cuda_library"] == str(library)
    assert set(answer) == {"flexkv", "core", "cuda_library", "python", "platform"}
    assert "compiler none" in run("version").stdout


def test_version_without_core_and_with_a_broken_configuration(no_core: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "nonsense")
    monkeypatch.setenv("FLEXKV_CUDA_LIBRARY", "/does/not/exist.so")
    result = run("version")
    assert result.exit_code == 0
    assert "missing" in result.stdout
    assert "no device library" in result.stdout


# ---- config


def test_config_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "32")
    monkeypatch.setenv("FLEXKV_NAMESPACE", "[bold]x[/bold]")
    output = run("config", "show").stdout
    assert "32 GiB" in output
    assert "env FLEXKV_CPU_CACHE_GB" in output
    assert "[bold]x[/bold]" in output
    assert "evict_ratio" in output
    assert "evict_ratio" not in run("config", "show", "--changed").stdout


def test_config_show_explains_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "auto")
    assert "auto: 0.8 x (" in run("config", "show", "--changed").stdout


def test_config_show_json(tmp_path: Path) -> None:
    file = tmp_path / "flexkv.yml"
    file.write_text("evict_ratio: 0.25\nredis_password: hunter2\nenable_mps: 1\n")
    output = run("config", "show", "--json", "--changed", "--file", str(file)).stdout
    rows = {row["key"]: row for row in json.loads(output)["settings"]}
    assert rows["evict_ratio"]["value"] == 0.25
    assert rows["evict_ratio"]["origin"] == f"{file}:1"
    assert rows["enable_mps"]["status"] == "not needed"
    assert rows["redis_password"]["text"] == "***"
    assert "hunter2" not in output
    assert "hunter2" not in run("config", "show", "--file", str(file)).stdout


def test_config_errors_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_EVICT_RATIO", "2")
    for command in (["config", "show"], ["serve"], ["status"]):
        result = run(*command)
        assert result.exit_code == 1
        assert result.stderr.startswith("flexkv: evict_ratio: wrong value '2' from env FLEXKV_EVICT_RATIO")
        assert len(result.stderr.splitlines()) == 1


def test_config_reference() -> None:
    assert run("config", "reference").stdout == reference_page()


# ---- status


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user sees the runtime directory. Root may read everything, so the system call is replaced."""

    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("flexkv.node_sockets.os.listdir", refuse)


def test_another_users_runtime_directory(core: types.ModuleType, unreadable: None) -> None:
    expected = f"cannot read {runtime_dir()}: it belongs to {runtime_dir().owner()}; run as that user"
    for command in ("status", "reset"):
        result = run(command)
        assert (result.exit_code, result.stderr) == (1, f"flexkv: {expected}\n")
    result = run("status", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "nodes": [],
        "unreachable": [{"socket": str(runtime_dir()), "error": expected}],
    }


def test_status_without_a_node(no_core: None) -> None:
    result = run("status")
    assert result.exit_code == 3
    assert "flexkv serve" in result.output
    assert run("status", "--json").exit_code == 3
    assert json.loads(run("status", "--json").stdout) == {"nodes": [], "unreachable": []}


def test_status(node: Any) -> None:
    result = run("status")
    assert result.exit_code == 0
    for expected in (
        *("default", "16 GiB", "50.0 %", "90.0 %", "never seen 90, evicted 10", "[red]llama", "1.2 ms", "2.5 s"),
        *("1.00 MB/s", "1 h 6 min", "degraded", "pool is full", "refused_blocks.pool_full 3"),
        "attached processes (schedulers and ranks of engines) 2",
    ):
        assert expected in result.output, expected


def test_status_of_a_node_with_drives(node: Any) -> None:
    (runtime_dir() / "default.status").write_text(json.dumps(fake_core.WITH_DISK))
    output = run("status").output
    for expected in (
        *("2 TiB", "512 GiB", "25.0 %", "120,000", "/mnt/[a]", "6 GiB", "4 GiB"),
        *("reads only: no space", "off: an I/O hangs for 2000 ms", "SSD -> host", "host -> SSD", "321"),
        "SSD -> host, blocks failed: deadline 3, checksum 1",
        "evicted",
        "SSD: reading what the drives hold of [red]llama",
        "SSD: 120,000 blocks found in 1.25 s, discarded: orphan 40, damaged 3; /mnt/b: old blocks are not used",
        "SSD: reads measured at 3.50 GB/s",
        "SSD: 5 TiB written in all, 256 GiB in the last 24 hours of 1 TiB allowed, pressure 0.12, 3.4 years of life left",
        "SSD: blocks offered: refused first touch 900, admitted 100",
        "SSD: 900 blocks checked in 1 min 15 s, done 2 min 10 s ago, 2 damaged, 0 unreadable, 0 unchecked",
    ):
        assert expected in output, expected


def test_evictions_of_both_tiers(node: Any) -> None:
    (runtime_dir() / "default.status").write_text(json.dumps(fake_core.WITH_DISK))
    rows = [line.split() for line in run("status").output.splitlines()]
    assert [row[-4] for row in rows if row[:2] == ["host", "16"]] == ["11"]  # before "4 KiB pages"
    assert [row[-2] for row in rows if row[:2] == ["SSD", "2"]] == ["5"]


def test_a_tier_without_a_usable_drive_is_off(node: Any) -> None:
    drives = [
        {"directory": "/mnt/a", "reads": False, "writes": False, "why": "gone", "bytes": 1 << 40, "used_bytes": 77}
    ]
    (runtime_dir() / "default.status").write_text(json.dumps(fake_core.STATUS | {"disk": {"drives": drives}}))
    output = run("status").output
    (row,) = [line.split() for line in output.splitlines() if line.startswith("SSD")]
    assert row == ["SSD", "off", *"-----"]
    assert "77 B" not in output
    assert "off: gone" in output


def test_status_tells_how_far_a_check_is() -> None:
    scrub = fake_core.scrub_of("/mnt/[a]", "running")
    assert "SSD: being checked for 1 min 15 s: 900 of 1,000 blocks, 0 damaged, 0 unreadable, 0 unchecked" in [
        str(line) for line in drive_lines({"disk": fake_core.DISK | {"scrub": scrub}})
    ]


def test_status_tells_what_was_chosen_and_why() -> None:
    lines = [str(line) for line in drive_lines({"disk": fake_core.DISK})]
    at = next(i for i, line in enumerate(lines) if "requests were to load" in line)
    assert lines[at] == "SSD: of what was found, requests were to load all 41, none 2; 333 blocks computed instead"
    assert lines[at + 1].endswith("ago 77 of 77 blocks (- in host memory): reads_unknown")
    assert lines[at + 2].endswith(
        "ago 100 of 1,320 blocks (40 in the engine, 60 in host memory): 540.0 ms expected, 700.0 ms with all, 650.0 ms with none"
    )
    none = fake_core.DISK["choices"] | {"all": 0, "none": 0, "latest": []}
    assert not any("to load" in str(line) for line in drive_lines({"disk": fake_core.DISK | {"choices": none}}))


def test_status_without_drives_has_no_word_of_them(node: Any) -> None:
    (runtime_dir() / "default.status").write_text(json.dumps(fake_core.STATUS | {"disk": None}))
    assert "drive" not in run("status").output


def test_status_json_and_name(node: Any) -> None:
    (answer,) = json.loads(run("status", "--json", "--name", "default").stdout)["nodes"]
    assert answer["lookups"] == fake_core.STATUS["lookups"]
    assert run("status", "--name", "other").exit_code == 3


def test_the_socket_of_a_killed_node_is_no_error(core: types.ModuleType) -> None:
    killed = fake_core.Node({"pool_bytes": 1})
    killed.listen(str(runtime_dir()), "killed")
    assert killed.socket is not None
    killed.socket.close()
    assert run("status").exit_code == 3


@pytest.mark.parametrize(
    ("days", "text"),
    [
        (12.3, ", 12 days of life left"),
        (729, ", 729 days of life left"),
        (800, ", 2.2 years of life left"),
        (1e9, ", more than 100 years of life left"),
        (None, "pressure 0.12"),
    ],
)
def test_life_left(days: float | None, text: str) -> None:
    disk = {"drives": [fake_core.DISK["drives"][0]], "endurance": fake_core.DISK["endurance"] | {"days_left": days}}
    assert [str(line) for line in drive_lines({"disk": disk})][0].endswith(text)


def test_how_each_drive_is_read_and_written() -> None:
    lines = [str(line) for line in drive_lines({"disk": fake_core.DISK})]
    assert "SSD: /mnt/[a] (xfs): io_uring with registered files, direct" in lines
    assert sum("io_uring" in line for line in lines) == 1  # the others are of an older node, or could not be opened


def test_life_of_each_of_several_drives() -> None:
    drive = fake_core.DISK["drives"][0]
    lines = drive_lines({"disk": fake_core.DISK | {"drives": [drive, drive | {"directory": "/mnt/b"}]}})
    expected = "/mnt/b: 3 TiB written in all, 128 GiB in the last 24 hours of 512 GiB allowed"
    assert sum(expected in str(line) for line in lines) == 1


@pytest.mark.parametrize("answer", ["[]", "nonsense"])
def test_a_node_that_does_not_answer_well(node: Any, answer: str) -> None:
    (runtime_dir() / "default.status").write_text(answer)
    result = run("status")
    assert result.exit_code == 1
    assert "default.sock" in result.stderr


def test_status_without_the_compiled_part(node: Any, no_core: None) -> None:
    result = run("status")
    assert result.exit_code == 1
    assert "pip install" in result.stderr


@pytest.mark.parametrize("hole", [None, {}, [], [1], "x", 5, {"a": None}, {"to_host": 3}])
def test_status_tables_bear_holes(hole: object) -> None:
    from rich.console import Console

    console = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    for key in fake_core.WITH_DISK:
        console.print(node_view(fake_core.WITH_DISK | {key: hole}, None, 0))
    for key in fake_core.DISK:
        console.print(node_view({"disk": fake_core.DISK | {key: hole}}, None, 0))
        console.print(node_view({"disk": fake_core.DISK | {key: [hole, {key: hole}]}}, None, 0))
    console.print(node_view({}, fake_core.STATUS, 1))
    for group, fields in fake_core.STATUS.items():
        for field in fields if isinstance(fields, dict) else []:
            console.print(node_view(fake_core.STATUS | {group: fields | {field: hole}}, fake_core.STATUS, 2))
    console.file.close()


# ---- serve


def test_serve_without_the_compiled_part(no_core: None) -> None:
    result = run("serve")
    assert result.exit_code == 1
    assert "pip install" in result.stderr


def test_serve_that_cannot_start(core: types.ModuleType) -> None:
    result = run("serve", "--cpu-cache", "100T")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("flexkv: cpu_cache_gb: 100 TiB from command line does not fit in host memory: ")
    assert last.endswith("; give less, or auto (FLEXKV_CPU_CACHE_GB, or --cpu-cache of flexkv serve)")


def test_a_size_that_nobody_asked_for_gives_way(
    core: types.ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fake_core.Node, "wait", lambda self, stop_fd: None)
    monkeypatch.setattr(node_start, "read_host_memory", lambda: HostMemory(3 << 30, "available on the machine"))
    assert "pool 1 GiB in" in run("serve").stdout, "also where the core does not see the limit"
    monkeypatch.setattr(fake_core.Node, "room", 2 << 30)
    monkeypatch.setattr(node_start, "read_host_memory", lambda: HostMemory(next(available), "available on the machine"))
    available = iter([17 << 30, 3 << 30])  # it shrinks while the node starts
    caplog.clear()
    result = run("serve")
    assert result.exit_code == 0, result.output
    assert "pool 1 GiB in" in result.stdout
    (warning,) = caplog.messages
    expected = (
        "the default host memory of the cache, 16 GiB, does not fit: 3 GiB available on the machine; taking 1 GiB"
    )
    assert warning.startswith(expected)
    monkeypatch.setattr(node_start, "read_host_memory", lambda: HostMemory(3 << 30, "available on the machine"))
    monkeypatch.setattr(fake_core.Node, "room", 1)
    assert "; nor does 1 GiB: " in run("serve").stderr
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "auto")
    assert " (auto) from env FLEXKV_CPU_CACHE_GB does not fit" in run("serve").stderr


def test_warnings_come_once_and_in_one_form(core: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_core.Node, "wait", lambda self, stop_fd: None)
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger("flexkv"), "handlers", [handler])
    monkeypatch.setenv("FLEXKV_NO_SUCH_SETTING_AT_ALL", "1")
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        handler.setStream(sys.stderr)
        run("serve", "--cpu-cache", "1")
    lines = [line for line in stderr.getvalue().splitlines() if "FLEXKV_NO_SUCH_SETTING_AT_ALL" in line]
    assert len(lines) == 1
    assert re.fullmatch(r"W \d\d-\d\d [\d:.]{12} \[FLEXKV \d+\] FLEXKV_NO_SUCH_SETTING_AT_ALL .*", lines[0]), lines


def test_serve_wrong_options(core: types.ModuleType) -> None:
    assert "from command line" in run("serve", "--cpu-cache", "lots").stderr
    assert run("serve", "--name", "a/b").exit_code == 1
    assert run("serve", "--name", "embedded").exit_code == 2
