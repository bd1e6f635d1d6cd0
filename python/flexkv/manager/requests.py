"""What a task ended with, as engines ask for it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class KVResponseStatus(enum.Enum):
    SUCCESS = "success"
    NOTFOUND = "not_found"  # no such task, or its response was taken already
    UNREADY = "unready"  # not launched yet
    TIMEOUT = "timeout"  # runs on; may be waited for again
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True)
class KVResponse:
    """`return_mask`: which tokens were loaded or stored, also by a get that has failed; of a batch, a list with one mask
    for each task."""

    status: KVResponseStatus
    task_id: int
    return_mask: np.ndarray | list[np.ndarray] | None = None
    reason: str = ""  # why it failed, for people

    def get_mask(self, index: int = 0) -> torch.Tensor:
        import torch

        masks: Any = self.return_mask if isinstance(self.return_mask, list) else [self.return_mask]
        return torch.from_numpy(masks[index])
