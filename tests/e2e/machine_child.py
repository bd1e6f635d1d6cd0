"""The program of an engine's further machine: `machine_child.py SPEC`, as `vllm serve --headless --node-rank N` does it. Its
ranks work for the scheduler of the first one until they are killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import EngineArgs
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    arguments = json.loads(Path(sys.argv[1]).read_text())
    config = EngineArgs(**arguments).create_engine_config(headless=True)
    executor = MultiprocExecutor(config, monitor_workers=False)
    executor.start_worker_monitor(inline=True)


if __name__ == "__main__":
    main()
