"""`examples/cluster/cluster.py` does what it says, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from engine import marked_processes
from nursery import MARK

_SCRIPT = Path(__file__).parents[2] / "examples/cluster/cluster.py"


def start(tmp_path: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """And the mark that all it starts have in their environment."""
    mark = f"cluster example {tmp_path}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FLEXKV_", "AWS_"))} | {
        MARK: mark,
        "TMPDIR": str(tmp_path),
        "VLLM_CPU_CI_ENV": "1",  # nothing is compiled
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-P", str(_SCRIPT), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), mark


def output(process: subprocess.Popen[str], mark: str) -> str:
    """All it says, to its end; whatever happens, nothing of it is left."""
    try:
        return process.communicate(timeout=600)[0]
    finally:
        if process.poll() is None:
            for pid in (process.pid, *marked_processes(mark)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_the_second_engine_finds_what_the_first_computed(tmp_path: Path) -> None:
    pytest.importorskip("moto.server")
    process, mark = start(tmp_path)
    out = output(process, mark)
    assert process.returncode == 0, out[-6000:]
    found = re.findall(r"^engine on node (\w): (\d+) of (\d+) prompt tokens", out, re.MULTILINE)
    (_, first, asked), (_, second, _) = found
    assert (int(first), int(asked) - int(second) < 64) == (0, True), out
    assert "their answers are the same" in out
    assert out.count("it knows the secret") == 3 and ", 0 wrong" in out
    assert re.search(r"read from others: [1-9]\d* blocks", out)
    assert marked_processes(mark) == []
    assert not list(tmp_path.glob("flexkv-cluster-*"))


def test_it_clears_up_when_it_is_interrupted(tmp_path: Path) -> None:
    process, mark = start(tmp_path, "--store", f"file://{tmp_path}/store")
    assert process.stdout is not None
    for line in process.stdout:
        if "it knows the secret" in line:
            break
    process.send_signal(signal.SIGINT)
    out = output(process, mark)
    assert process.returncode == 130, out[-6000:]
    assert marked_processes(mark) == []
    assert not list(tmp_path.glob("flexkv-cluster-*"))
