"""What a stage is: a step of a graph, built from options and a context, run on batches.

A stage MUST NOT know its neighbours, start tasks, or write into what it was given (forks share it). It
marks a piece lost where only that piece is bad; an exception means the stage itself is broken. What it
takes (leases above all) it hands to `batch.defer`, so that it goes home by the same road always.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from .arena import Arena
    from .layout import Geometry
    from .payload import Batch, Ticket
    from .tiers.base import Tier


class Lane(Enum):
    """Where a stage runs."""

    ENGINE = "engine"
    """The engine's own thread: kernel launches and event records, never a wait."""
    LOOP = "loop"
    """A coroutine on the one portal thread: never holds the GIL for more than 100 us."""
    POOL = "pool"
    """A thread of the pool: a blocking call that frees the GIL."""


class PortType(NamedTuple):
    """What travels on a wire: `kind@place/grain`. Two fit when each word is equal or `any`."""

    kind: str
    """tokens, keys, plan, kv (plain), bytes (perhaps encoded), receipt."""
    place: str
    """host or device."""
    grain: str
    """request or frame."""

    @classmethod
    def parse(cls, text: str) -> PortType:
        kind, _, rest = text.partition("@")
        place, _, grain = rest.partition("/")
        return cls(kind, place, grain)

    def clash(self, wanted: PortType) -> str | None:
        """The word in which this does not fit `wanted`, or None."""
        for name, a, b in zip(self._fields, self, wanted, strict=True):
            if a != b and "any" not in (a, b):
                return name
        return None

    def __str__(self) -> str:
        return f"{self.kind}@{self.place}/{self.grain}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkOptions:
    """How prompts are cut."""

    tokens: int = 256
    """Tokens of a chunk: the unit of storage."""
    grain: int = 32
    """Tokens of a grain: the unit of a hit; divides `tokens`."""
    group: int = 4
    """Layers of a frame: the unit of pipelining."""
    partial: bool = True
    """Keep a prompt's last chunk even when it is not full."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.grain, self.group) < 1:
            raise ValueError("tokens, grain and group must be at least 1")
        if self.tokens % self.grain:
            raise ValueError(f"grain {self.grain} does not divide tokens {self.tokens}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What a stage may know: the pipeline it serves, nothing of the graph it stands in."""

    graph: str
    chunk: ChunkOptions
    geometry: Geometry
    device: str
    """'cpu' or 'cuda': where the engine's cache lives."""
    verify: str
    """'always': every frame is checked before it is placed; 'remote': memory is trusted."""
    arena: Arena
    tiers: Mapping[str, Tier]
    pool: Callable[..., Awaitable[Any]]
    """Runs a blocking call; see TierContext.pool."""


class Stage(ABC):
    """Subclass, say what goes in and out, and register the name in `catalog.py`."""

    Options: ClassVar[type[Any]]
    """The frozen dataclass of this stage's options."""
    takes: ClassVar[str]
    """Port type of the input, e.g. `kv@device/frame`."""
    gives: ClassVar[str]
    """Port type of the output; `same` passes the input's kind, place and grain on."""
    lane: ClassVar[Lane]
    tier_options: ClassVar[tuple[str, ...]] = ()
    """Options that name tiers, so that the checker can look them up."""

    def __init__(self, options: Any, ctx: Context) -> None:
        self.options, self.ctx = options, ctx

    def plan(self, ticket: Ticket) -> None:
        """Stages of grain `request`, lane POOL: work on the whole request."""
        raise NotImplementedError

    def apply(self, batch: Batch) -> Batch:
        """Stages of grain `frame`, lane POOL: work on a batch in a thread of the pool."""
        raise NotImplementedError


class LoopStage(Stage):
    """A stage that awaits: I/O and bookkeeping."""

    lane = Lane.LOOP

    async def plan_async(self, ticket: Ticket) -> None:
        """Stages of grain `request`."""
        raise NotImplementedError

    async def apply_async(self, batch: Batch) -> Batch:
        """Stages of grain `frame`."""
        raise NotImplementedError


__all__ = ["ABC", "ChunkOptions", "Context", "Lane", "LoopStage", "PortType", "Stage", "abstractmethod"]
