"""Loads that the forward follows layer by layer: SGLang's KV pools ask for each layer before they read it."""

from __future__ import annotations

import logging
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import torch

from flexkv.integration.sglang.pages import PageStore

logger = logging.getLogger("flexkv.sglang")


class Streams:
    """Of the GPU, as numbers; 0 on CPUs."""

    def __init__(self, forward_stream: Any) -> None:
        """`forward_stream`: where SGLang's forwards run, if that is not the current one."""
        self._forward = forward_stream
        self._join: Any = None

    def launched(self) -> int:
        """One that has reached what SGLang has launched by now, wherever. Loads wait for that, too: a forward that runs
        may still write to slots that a finished request has given back."""
        if not torch.cuda.is_initialized():
            return 0
        if self._join is None:
            self._join = torch.cuda.Stream()
        self._join.wait_stream(torch.cuda.current_stream())
        if self._forward is not None:
            self._join.wait_stream(self._forward)
        return self._join.cuda_stream

    @staticmethod
    def computing() -> int:
        """The one that the caller's layer is going to be computed on."""
        return torch.cuda.current_stream().cuda_stream if torch.cuda.is_initialized() else 0


class Batch:
    """The loads of one pool that begin together."""

    def __init__(self, store: PageStore, jobs: list[int]) -> None:
        self.jobs = jobs
        self.agent = store.agent
        self._layers = store.pool.layers
        self._parts = list(accumulate(store.agent.parts(), max))
        self._reached = 0

    def reach(self, layer: int, stream: int) -> None:
        """What is computed from now on starts when the loads have filled this layer and those before it. No thread
        waits for that, except on CPUs, where the stream is the thread."""
        tensors = bisect_right(self._layers, layer)
        parts = self._parts[tensors - 1] if tensors > 0 else 0
        if parts > self._reached:
            self.agent.hold_engine(self.jobs, parts, stream)
            self._reached = parts

    def followed(self) -> bool:
        return self._reached == self._parts[-1]


class LayerCounter:
    """As SGLang's pools and forwards use it."""

    def __init__(self, num_layers: int, streams: Streams) -> None:
        self.num_layers = num_layers
        # What the forward of now follows. SGLang asks for it where a forward replays a whole graph or copies a state.
        self.consumer_index = -1
        self._streams = streams
        self._batches: dict[int, list[Batch]] = {}
        self._begun = -1
        self._current: list[Batch] = []
        self._layers_ask = True

    def begin(self, batches: list[Batch]) -> int:
        """Their jobs run from now on; returns what set_consumer() and finish() take."""
        self._begun += 1
        self._batches[self._begun] = batches
        stream = self._streams.launched()
        for batch in batches:
            batch.agent.arm_loads_in_parts(batch.jobs, stream)
        return self._begun

    def set_consumer(self, index: int) -> None:
        """Of the next forward; -1: it follows none."""
        self._current = self._batches.get(index, [])
        self.consumer_index = index
        if not self._layers_ask:
            self.wait_until(self.num_layers - 1)

    def wait_until(self, layer: int) -> None:
        for batch in self._current:
            batch.reach(layer, self._streams.computing())

    def finish(self, index: int) -> bool:
        """After the forward: waits until nothing of the batch is written any more. False: some of it was not loaded in
        time."""
        batches = self._batches.pop(index, [])
        if batches is self._current:
            self._current = []
        ok = True
        for batch in batches:
            ok &= not batch.agent.wait_loads(batch.jobs)
            if not batch.followed():
                ok = False
                if self._layers_ask:
                    self._layers_ask = False
                    logger.warning(
                        "not all layers of this model wait for their loads: forwards will wait for all of them"
                    )
        return ok
