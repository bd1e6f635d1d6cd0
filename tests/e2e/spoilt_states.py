"""States saved wrongly, on purpose: what the rules of docs/decisions/0026 are there for. For engines in this process."""

from __future__ import annotations

from typing import Any

_LATE_STEPS = 40


def spoil(how: str) -> None:
    """From now on. "named after the block before"; "saved late", by workers that wait, as on a machine where copies are slow;
    "never called off", whatever overwrites them."""
    from flexkv.integration.vllm.save_orders import SaveOrders
    from flexkv.integration.vllm.worker import WorkerSide

    save, start = SaveOrders._save_state, WorkerSide.start_saves
    held: list[list[tuple[int, int]]] = []

    def save_as_before(self: Any, group: Any, request_id: str, block: int, tokens: int, meta: Any) -> None:
        if tokens > group.block_tokens:
            save(self, group, request_id, block, tokens - group.block_tokens, meta)

    def start_late(self: Any, meta: Any) -> None:
        held.append([job for job in meta.saves if self._groups[job[0]].holds_states])
        meta.saves = [job for job in meta.saves if job not in held[-1]]
        if len(held) > _LATE_STEPS:
            meta.saves += held.pop(0)
        start(self, meta)

    match how:
        case "named after the block before":
            SaveOrders._save_state = save_as_before
        case "saved late":
            WorkerSide.start_saves = start_late
        case "never called off":
            SaveOrders._call_off = lambda self, job: self._running.call_off(job)
        case _:
            raise ValueError(how)
