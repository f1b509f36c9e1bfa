"""What travels through a graph: chunks of a request, in batches.

Failure is data here: a chunk that is lost travels on with the others and is reported at the end, so
that leases are released and gates open in one place, whatever happened.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import anyio

from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.contract.request import Request
from tierloom.stages.errors import BadObject, Lost
from tierloom.stages.kv.object import Header
from tierloom.stages.memory.arena import Arena, Lease


@dataclass(slots=True, eq=False)
class BatchResources:
    """What the chunks of a batch hold while any of its branches or waves is under way."""

    chunks: list[Chunk]
    open: int = 1
    """Branches and waves that are still to end."""
    closing: ExitStack = field(default_factory=ExitStack)
    """Run when the last of them has ended."""
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    """Held by a wave that reads into leases which the waves after it read into as well."""


@dataclass(slots=True)
class Batch:
    """Chunks of one request that go together, and which frames of them."""

    request: Request
    resources: BatchResources
    frames: range
    forked: bool = False
    """On a branch: what is lost here is lost to this branch only."""
    lost: set[int] = field(default_factory=set)
    """Indices of chunks lost to this branch."""
    encoder: object | None = None
    """The stage whose encoding this branch carries; None: the plain object."""
    launched: bool = False
    """Its copy is under way on a device, or was given up."""
    passed: bool = False
    """Beyond the stage that touches the engine's memory."""

    @property
    def live(self) -> list[Chunk]:
        return [c for c in self.resources.chunks if c.lost is None and c.index not in self.lost]

    def frames_of(self, header: Header) -> range:
        """The frames of an object's first scan that go with this batch. One that was written with
        another layer group goes whole, with the first wave."""
        if header.group == self.request.group:
            return self.frames
        return range(header.groups if self.frames.start == 0 else 0)

    def reserve(self, arena: Arena, nbytes: int) -> bool:
        """A promise beyond the batch's own, until it ends; False: nobody has that much to spare."""
        if arena.promises.try_reserve(nbytes):
            self.defer(partial(arena.promises.unreserve, nbytes))
            return True
        return False

    def lose(self, chunk: Chunk, code: Lost) -> None:
        self.request.tally(code)
        if self.forked:
            self.lost.add(chunk.index)
        else:
            chunk.lost = code

    def leases(self) -> list[Lease]:
        """What a call on it may touch."""
        return [lease for chunk in self.resources.chunks for lease in chunk.leases()]

    def refuse(self, chunk: Chunk, error: BadObject) -> None:
        """The chunk's object came, and cannot be used."""
        chunk.refused = error
        self.lose(chunk, error.lost)

    def fork(self) -> Batch:
        """The same chunks for one of several readers."""
        return replace(self, forked=True, lost=set(self.lost))

    def launch(self) -> None:
        """Its copy is under way, or will not be."""
        launches = self.request.memory.launches
        if launches is not None and not self.launched:
            self.launched = True
            launches.begun(len(self.frames))

    def leave_engine(self) -> None:
        """It is beyond the engine's memory, or never came that far."""
        self.launch()
        if not self.passed:
            self.passed = True
            self.request.gates.passed(self.frames)

    @property
    def ticket(self) -> Request:
        """The request, under the name that it had until 0.1."""
        warnings.warn("batch.ticket is batch.request", DeprecationWarning, stacklevel=2)
        return self.request

    def defer(self, release: Callable[[], None]) -> None:
        """Have `release` called, last first, when the last branch and wave has ended."""
        self.resources.closing.callback(release)
