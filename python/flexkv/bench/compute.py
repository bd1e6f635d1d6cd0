"""Work for the GPU to do beside transfers: a matrix product, and a reader of memory as decoding is one."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Compute:
    """Owned by one thread, on that thread's current stream."""

    def __init__(self, kind: str, device: torch.device) -> None:
        if kind == "gemm":
            # Random data: on zeros the chip would clock higher.
            a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
            out = torch.empty_like(a)
            self._step: Callable[[], object] = lambda: torch.mm(a, b, out=out)
        else:
            data = torch.ones(1 << 28, device=device)
            total = torch.empty((), device=device)
            self._step = lambda: torch.sum(data, dim=0, out=total)
        self.seconds(0.2)

    def seconds(self, duration: float) -> tuple[float, int]:
        """Runs for about so long; seconds of one step by the GPU's clock, and how many there were."""
        self._step()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        steps, total = 0, 0.0
        while total < duration:
            begin.record()
            for _ in range(20):
                self._step()
            end.record()
            end.synchronize()
            total += begin.elapsed_time(end) / 1e3
            steps += 20
        return total / steps, steps
