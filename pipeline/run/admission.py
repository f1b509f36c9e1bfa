"""Which of a planned request's batches may enter the graph: as memory is promised to them, and in
waves as the model goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import anyio

from tierloom.stages.contract.batch import Batch, BatchResources
from tierloom.stages.contract.request import Request
from tierloom.stages.errors import ArenaFull, Lost
from tierloom.stages.memory.arena import Arena


@dataclass(slots=True)
class Progress:
    """How far a request has come between its plan and the graph's body."""

    cancels: set[anyio.CancelScope]
    """What is waited for on its behalf, to be cancelled with it."""
    batches: list[BatchResources]
    batches_open: int = 0
    """Batches that have not left the graph."""
    memory_asked: bool = False
    memory_promised: bool = False
    """In waves: to all of the request."""
    emitted: int = 0
    """In waves: layer groups that have entered the graph."""


class Admission:
    """Promises memory to batches in order, and sends each on once it has it."""

    def __init__(
        self, arena: Arena, chunk_bytes: int, send: Callable[[Batch], Awaitable[None]]
    ) -> None:
        """`chunk_bytes`: what a chunk may need of the arena on its whole way. `send` brings a batch
        into the graph's body."""
        self.chunk_bytes = chunk_bytes
        self._arena, self._send = arena, send
        self.model_went_on: asyncio.Queue[tuple[Request, Progress]] = asyncio.Queue()
        self.waiting: asyncio.Queue[tuple[Request, Progress]] = asyncio.Queue()

    async def admit(self, request: Request, progress: Progress) -> None:
        """Promise memory to the request's batches, in order, and let each one go as it has it.

        Waves need all of the request's memory until the last layer, so they get it in one promise:
        two requests must not each hold half of what both wait for.
        """
        progress.memory_asked = True
        if request.layered:
            need = len(request.chunks) * self.chunk_bytes
            promised = await self._reserve(progress, need)
        for resources in progress.batches:
            need = len(resources.chunks) * self.chunk_bytes
            if not request.layered:
                promised = await self._reserve(progress, need)
            if promised:
                resources.closing.callback(partial(self._arena.unreserve, need))
            elif request.cancelled is None:
                for chunk in resources.chunks:
                    chunk.lost = Lost.NO_ROOM
                    request.tally(Lost.NO_ROOM)
            if not request.layered:
                await self._send(Batch(request, resources, range(request.groups)))
        if request.layered:
            progress.memory_promised = True
            self.model_went_on.put_nowait((request, progress))

    async def emit(self, request: Request, progress: Progress) -> None:
        """The model went on: send the waves that its position allows, or all when it is done."""
        if not request.layered:
            asked = progress.memory_asked or not progress.batches
            if not asked and request.allowed == request.groups:
                progress.memory_asked = True
                self.waiting.put_nowait((request, progress))
            return
        while progress.memory_promised and progress.emitted < request.allowed:
            frames = range(progress.emitted, progress.emitted + 1)
            progress.emitted += 1
            for resources in progress.batches:
                await self._send(Batch(request, resources, frames))

    async def _reserve(self, progress: Progress, nbytes: int) -> bool:
        """Wait for a promise of memory; False when the request is cancelled, or asks too much."""
        with anyio.CancelScope() as waiting:
            progress.cancels.add(waiting)
            try:
                await self._arena.reserve(nbytes)
            except ArenaFull:
                return False
            finally:
                progress.cancels.discard(waiting)
        return not waiting.cancelled_caught
