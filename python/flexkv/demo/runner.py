"""The process of one run: `python -m flexkv.demo.runner SPEC`, with SPEC a JSON object.

Writes one JSON object a line to the descriptor `events` of the spec: {"event": "ready"}, {"event": "request", ...} for
each request, {"event": "done"}, or {"event": "error", "message": ...}. Standard output and error are the engine's log.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from typing import Any

from .engines import LlmEngine, ServerEngine, engine_arguments
from .workload import Request, Workload, play


def main() -> int:
    spec = json.loads(sys.argv[1])
    events = os.fdopen(spec["events"], "w", buffering=1)
    # The engine's own processes must not inherit it: the reader waits for the last writer to go.
    os.set_inheritable(events.fileno(), False)

    def emit(event: str, **fields: Any) -> None:
        events.write(json.dumps({"event": event} | fields) + "\n")

    try:
        _run(spec, emit)
    except Exception as error:  # noqa: BLE001  (whatever it is, the command has to say it)
        traceback.print_exc()
        emit("error", message=f"{type(error).__name__}: {error}")
        return 1
    emit("done")
    return 0


def _run(spec: dict[str, Any], emit: Any) -> None:
    from transformers import AutoTokenizer

    workload = Workload(**spec["workload"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    arguments = engine_arguments(spec["model"], spec["dtype"], workload, spec["flexkv"])
    engine = ServerEngine(arguments) if spec["serve"] else LlmEngine(arguments)
    try:
        emit("ready")
        play(workload, engine, encode, lambda request: _emit_request(emit, request))
    finally:
        engine.close()


def _emit_request(emit: Any, request: Request) -> None:
    emit("request", **dataclasses.asdict(request))


if __name__ == "__main__":
    sys.exit(main())
