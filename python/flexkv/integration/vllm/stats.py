"""What a worker moved, in the form that vLLM carries from workers to its logger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

COUNTS = {
    "loaded_blocks": "Blocks copied from the cache to the device, counted on every rank.",
    "saved_blocks": "Blocks copied from the device to the cache, counted on every rank.",
    "failed_jobs": "Transfers that failed or were given up, counted on every rank.",
}


@dataclass
class FlexKVStats(KVConnectorStats):
    """Counts since the last report. Adds up over workers and steps."""

    def reset(self) -> None:
        self.data = dict.fromkeys(COUNTS, 0)

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name in COUNTS:
            self.data[name] = self.data.get(name, 0) + other.data.get(name, 0)
        return self

    def reduce(self) -> dict[str, int | float]:
        return {f"FlexKV {name.replace('_', ' ')}": self.data.get(name, 0) for name in COUNTS}

    def is_empty(self) -> bool:
        return not any(self.data.get(name, 0) for name in COUNTS)

    @classmethod
    def since(cls, counters: dict[str, Any], before: dict[str, Any]) -> FlexKVStats:
        return cls(data={name: counters[name] - before.get(name, 0) for name in COUNTS})
