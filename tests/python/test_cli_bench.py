"""`flexkv bench`, with a stand-in for the program that measures, and with the real one where it is installed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from flexkv.cli import bench_progress, run_bench
from flexkv.cli.app import app
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.usefixtures("clean_environment")

INSTALLED = run_bench.PROGRAM
REQUEST = '{"timestamp": 0, "input_length": 1000, "output_length": 1, "hash_ids": [1, 2]}\n'


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def measured(name: str, nanoseconds: float = 1.0, **figures: object) -> dict[str, Any]:
    return {"name": name, "cpu_time": nanoseconds, "real_time": 7e6, "time_unit": "ns", "iterations": 3, **figures}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes a program that answers with these benchmarks, with this code, after these lines on stderr."""
    path = tmp_path / "flexkv-bench"
    monkeypatch.setattr(run_bench, "PROGRAM", path)

    def make(benchmarks: list[dict[str, Any]], code: int = 0, message: str = "") -> None:
        answer = tmp_path / "answer.json"
        answer.write_text(json.dumps({"context": {"num_cpus": 2}, "benchmarks": benchmarks}))
        names = tmp_path / "names"
        names.write_text("".join(f"{row['name']}\n" for row in benchmarks))
        path.write_text(
            f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\ncat {names}\n'
            'for a; do case "$a" in --benchmark_list_tests) exit 0;; --benchmark_out=*) out=${a#*=};; esac; done\n'
            f'cp {answer} "$out"\necho "{message}" >&2\nexit {code}\n'
        )
        path.chmod(0o755)

    return make


def test_without_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_bench, "PROGRAM", tmp_path / "none")
    result = run("keys")
    assert result.exit_code == 1
    assert "libbenchmark-dev" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_figures_stand_beside_their_targets(program: Any) -> None:
    program(
        [
            measured("evict/chat4/blocks:10000/count:32/iterations:156", 1_500.0, per_block=4.7e-8),
            measured("evict/chat4/blocks:100000/count:32/iterations:1562", 2_500.0, per_block=8e-8),
            measured("memory/chat32/blocks:1000000/iterations:1", 9.0, **{"bytes/block": 23.5, "more_per_tier": 4.2}),
        ]
    )
    result = run("index")
    assert result.exit_code == 0
    for expected in ("1.5 us (<= 2 us)", "2.5 us (<= 2 us)", "47 ns", "23.5 (<= 48)", "3 of 4 targets met"):
        assert expected in result.stdout, expected
    rows = json.loads(run("index", "--json").stdout)["benchmarks"]
    assert [row["name"] for row in rows[:2]] == [f"evict/chat4/blocks:{n}/count:32" for n in ("10000", "100000")]
    assert [row["targets"]["time_ns"]["met"] for row in rows[:2]] == [True, False]


def test_a_target_may_be_another_figure_of_the_run(program: Any) -> None:
    flat, chat4 = (f"match/{shape}/blocks:1000000/hit:100" for shape in ("flat512", "chat4"))
    program([measured(flat, 300.0), measured(chat4, 601.0)])
    rows = json.loads(run("index", "--json").stdout)["benchmarks"]
    assert rows[1]["targets"] == {"time_ns": {"limit": 600.0, "at_least": False, "met": False}}
    program([measured(chat4, 601.0)])
    assert json.loads(run("index", "--json").stdout)["benchmarks"][0]["targets"] == {}


def test_what_times_itself_shows_its_own_time(program: Any) -> None:
    program([measured("insert32/flat512/blocks:1000000/manual_time", 900.0)])
    assert json.loads(run("index", "--json").stdout)["benchmarks"][0]["figures"] == {"time_ns": 7e6}


def test_replay_gives_the_trace_to_the_program(program: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(REQUEST)
    program([measured(f"policy/{name}/capacity:10000/iterations:1", **{"hit_%": 20.0}) for name in ("lru", "optimum")])
    result = run("replay", str(trace))
    assert result.exit_code == 0
    assert "policy/optimum/capacity:10000" in result.stdout
    assert (tmp_path / "calls").read_text().splitlines()[0] == f"replay {trace} --drive-gbs=6 --benchmark_list_tests"


def test_replay_with_drives_of_other_sizes(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(REQUEST)
    monkeypatch.setattr(run_bench, "_MOONCAKE_SHA256", hashlib.sha256(REQUEST.encode()).hexdigest())
    program([measured("drives/adaptive/admission/host:10/ssd:20/iterations:1", **{"saved_%": 20.0, "lost_hits_%": 1.0})])
    sizes = ("--host-blocks", "10", "--host-blocks", "11", "--ssd-blocks", "20", "--drive-gbs", "2.5")
    result = run("replay", str(trace), *sizes)
    assert result.exit_code == 0
    assert "20 (>= 70)" in result.stdout and "1 (<= 3)" in result.stdout
    call = (tmp_path / "calls").read_text().splitlines()[0]
    assert call == f"replay {trace} --drive-gbs=2.5 --host-blocks=10,11 --ssd-blocks=20 --benchmark_list_tests"
    assert run("replay", str(trace), "--ssd-blocks", "0").exit_code == 2


def test_cluster_gives_its_options_to_the_program(program: Any, tmp_path: Path, capfd: Any) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(REQUEST)
    program([])
    assert run("cluster", str(trace), "--nodes", "3", "--router", "prefix", "--json").exit_code == 0
    call = (tmp_path / "calls").read_text().splitlines()[0]
    expected = "--nodes=3 --blocks=1000000 --block-tokens=16 --router=prefix --minutes=60 --seed=1 --json"
    assert call == f"cluster {trace} {expected}"
    program([], code=2)
    assert run("cluster", str(trace)).exit_code == 2


def test_targets_of_a_replay_are_for_mooncakes_trace_only(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(REQUEST)
    program([measured("replay/capacity:1000/engine_hashes:1", get_p99_us=300.0)])
    result = run("replay", str(trace))
    assert "(<= " not in result.stdout and "no targets" in result.stdout
    assert json.loads(run("replay", str(trace), "--json").stdout)["benchmarks"][0]["targets"] == {}
    monkeypatch.setattr(run_bench, "_MOONCAKE_SHA256", hashlib.sha256(REQUEST.encode()).hexdigest())
    result = run("replay", str(trace))
    assert "300 (<= 200)" in result.stdout and "no targets" not in result.stdout


def test_help_says_where_the_trace_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert "github.com/kvcache-ai/Mooncake" in run("replay", "--help").output


def test_progress_without_a_terminal_is_lines(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program([measured("a"), measured("b")])
    begun = "flexkv bench keys: 2 figures, about 10 s"
    assert run("keys").stderr.splitlines() == [begun], "quick ones need no more"
    monkeypatch.setattr(bench_progress, "_LINE_SECONDS", 0)
    assert run("keys").stderr.splitlines() == [
        begun,
        "flexkv bench keys: 1 of 2 done, last a",
        "flexkv bench keys: 2 of 2 done, last b",
    ]


def test_names_are_whole_in_a_pipe(program: Any) -> None:
    long = "drives/adaptive/admission/host:2000/ssd:300000/block_tokens:16"
    program([measured(long, **{f"missed:reason_{i}_%": 1.0 for i in range(20)})])
    assert f"{long} " in run("host").stdout


def test_seconds_are_said_to_be(program: Any, tmp_path: Path) -> None:
    program([measured("recovery/in_order/blocks:1/drives:1", raw_read=0.5, cpu=0.0025, kept_GB=0.25)])
    output = run("recovery", str(tmp_path)).stdout
    assert "500 ms" in output and "2.5 ms" in output and "0.25\n" in output


def test_a_benchmark_that_failed(program: Any) -> None:
    program([{"name": "load/daemon", "error_occurred": True, "error_message": "not [bold]saved"}, measured("x", 2.0)])
    result = run("host")
    assert result.exit_code == 1
    assert "load/daemon  not [bold]saved" in result.stdout
    assert run("host", "--json").exit_code == 1


def test_a_program_that_fails(program: Any) -> None:
    program([measured("x")], code=134, message="assertion failed: here")
    result = run("keys")
    assert result.exit_code == 1
    assert "134" in result.stderr and "assertion failed: here" in result.stderr


def test_recovery_tells_the_program_how_many(program: Any, tmp_path: Path) -> None:
    program([measured("recovery/in_order/blocks:10000000/drives:2/iterations:1/manual_time")])
    result = run("recovery", str(tmp_path))
    assert result.exit_code == 0
    assert "7 ms (<= 5 s)" in result.stdout
    call = (tmp_path / "calls").read_text().splitlines()[0]
    assert call == f"recovery {tmp_path} --blocks=10000000 --drives=2 --benchmark_list_tests"
    assert run("recovery", str(tmp_path / "none")).exit_code == 2


def test_wrong_usage(tmp_path: Path) -> None:
    assert run("nonsense").exit_code == 2
    assert run("replay").exit_code == 2
    assert run("replay", str(tmp_path / "none")).exit_code == 2


@pytest.mark.skipif(not INSTALLED.exists(), reason="the wheel was built without Google Benchmark")
class TestInstalled:
    def test_keys(self) -> None:
        result = run("keys", "--json")
        assert result.exit_code == 0, result.output
        names = [row["name"] for row in json.loads(result.stdout)["benchmarks"]]
        assert "keys/tokens_per_block:16" in names and "fold/hash_bytes:32" in names

    def test_replay(self, tmp_path: Path) -> None:
        trace = tmp_path / "trace.jsonl"
        trace.write_text(REQUEST * 20)
        result = run("replay", str(trace), "--json")
        assert result.exit_code == 0, result.output
        rows = {row["name"]: row["figures"] for row in json.loads(result.stdout)["benchmarks"]}
        assert rows["policy/lru/capacity:10000"]["hit_%"] == pytest.approx(95)
        assert rows["policy/optimum/capacity:10000"]["hit_%"] == pytest.approx(95)
        assert "replay/capacity:10000/engine_hashes:1" in rows
        # All found in host memory; with admission, a block is written at its second use at the latest.
        for name in ("all_written", "admission"):
            figures = rows[f"drives/adaptive/{name}/host:2000/ssd:30000/block_tokens:16"]
            assert figures["host_%"] == pytest.approx(100 * 62 * 16 / 1000 * 19 / 20)
            assert figures["written_TB"] == pytest.approx(62 * 2 * 2**20 / 1e12)

    def test_replay_finds_on_drives_what_host_memory_cannot_hold(self, tmp_path: Path) -> None:
        trace = tmp_path / "trace.jsonl"
        requests = [
            {"timestamp": 10_000 * i, "input_length": 512, "hash_ids": [i % 4]} for i in range(8)
        ]  # a cycle of four blocks
        trace.write_text("".join(json.dumps(request) + "\n" for request in requests))
        sizes = ("--host-blocks", "2", "--ssd-blocks", "8")
        rows = {
            row["name"]: row["figures"]
            for row in json.loads(run("replay", str(trace), *sizes, "--json").stdout)["benchmarks"]
        }
        figures = rows["drives/lru/all_written/host:2/ssd:8/block_tokens:16"]
        assert figures["hit_%"] == figures["drive_%"] == pytest.approx(50)
        assert figures["missed:never_seen_%"] == pytest.approx(50)
        assert figures["written_TB"] == figures["read_TB"] == pytest.approx(4 * 32 * 2 * 2**20 / 1e12)
        slow = run("replay", str(trace), *sizes, "--drive-gbs", "0.001", "--json")
        rows = {row["name"]: row["figures"] for row in json.loads(slow.stdout)["benchmarks"]}
        assert rows["drives/lru/all_written/host:2/ssd:8/block_tokens:16"]["hit_%"] < figures["hit_%"]

    def test_cluster(self, tmp_path: Path, capfd: Any) -> None:
        trace = tmp_path / "trace.jsonl"
        requests = [
            {"timestamp": 1000 * i, "input_length": 1024, "hash_ids": [0, 1 + i % 5]} for i in range(20)
        ]  # five prompts, each four times
        trace.write_text("".join(json.dumps(request) + "\n" for request in requests))
        sizes = ("--nodes", "3", "--blocks", "1000", "--replicas", "2")
        figures = []
        for _ in range(2):
            assert run("cluster", str(trace), *sizes, "--json").exit_code == 0
            figures.append(json.loads(capfd.readouterr().out))
        hits = figures[0]["hit_%"]
        assert figures[0]["requests"] == 3 * 20
        # Of 40 blocks of 512 tokens there are six.
        assert hits["ideal"] == pytest.approx(100 * 34 / 40)
        assert hits["alone"] < hits["cluster"] <= hits["ideal"]
        assert hits["cluster"] == hits["own"] + hits["remote"]
        for each in figures:
            del each["this_machine"]
        assert figures[0] == figures[1], "the same seed"
        assert run("cluster", str(trace), *sizes, "--router", "any").exit_code == 2
        assert "--router: 'any' is neither round-robin nor prefix" in capfd.readouterr().err

    def test_recovery(self, tmp_path: Path) -> None:
        directory = tmp_path / "drive"
        directory.mkdir()
        result = run("recovery", str(directory), "--blocks", "30000", "--drives", "3", "--json")
        assert result.exit_code == 0, result.output
        rows = {row["name"]: row["figures"] for row in json.loads(result.stdout)["benchmarks"]}
        assert set(rows) == {f"recovery/{order}/blocks:30000/drives:3" for order in ("in_order", "shuffled")}
        assert list(directory.iterdir()) == []

    def test_a_trace_that_is_none(self, tmp_path: Path) -> None:
        trace = tmp_path / "trace.jsonl"
        trace.write_text(REQUEST + "nonsense\n")
        result = run("replay", str(trace))
        assert result.exit_code == 1
        assert result.stderr == f"flexkv: {trace}:2: not a request of a trace: this line is not JSON\n"
        trace.write_text(REQUEST + "\n" + '{"timestamp": 0}\n')
        expected = (
            f"flexkv: {trace}:3: not a request of a trace: it takes numbers as timestamp (in ms) and input_length"
        )
        assert run("replay", str(trace)).stderr.startswith(expected)
        trace.write_text('{"timestamp": 0, "input_length": 600, "hash_ids": [1]}\n')
        assert f"{trace}:1: input_length 600 is more than its 1 hash_ids cover" in run("replay", str(trace)).stderr
