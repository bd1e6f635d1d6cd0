"""`examples/vllm/offline.py` does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

_SCRIPT = Path(__file__).parents[2] / "examples/vllm/offline.py"


def test_the_second_question_finds_the_document(tiny_model: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "FLEXKV_RUNTIME_DIR": str(tmp_path),
        "FLEXKV_CPU_CACHE_GB": "256MB",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_CI_ENV": "1",  # nothing is compiled
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-P", str(_SCRIPT), str(tiny_model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    found = re.findall(r"^(\d+) of (\d+) prompt tokens", done.stdout, re.MULTILINE)
    assert len(found) == 2, done.stdout[-2000:] + done.stderr[-4000:]
    (first, _), (second, asked) = ((int(cached), int(asked)) for cached, asked in found)
    assert first == 0
    assert asked - second < 2 * 128  # what is left: the question, and the rest of a block
