"""What the scheduler side tells all workers, once per step; TensorRT-LLM pickles it. Ids only: blocks travel through
the node."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Place:
    """Where the node is, and as whose ranks the workers come to it: TensorRT-LLM gives an engine no name of its own."""

    node: str
    engine_id: str


@dataclass(slots=True)
class Load:
    request_id: int
    job: int = 0  # 0: it could not be ordered, and has failed


@dataclass(slots=True)
class StepMeta:
    step: int = 0
    place: Place | None = None
    # Of requests that are parked until each worker reports them.
    loads: list[Load] = field(default_factory=list)
    # Blocks that are complete after this step's forward.
    saves: list[int] = field(default_factory=list)
    # Loads into blocks that this step writes to for somebody else: they must be quiet before it begins.
    revoked_loads: list[int] = field(default_factory=list)
