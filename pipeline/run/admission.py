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
from tierloom.stages.errors import Lost
from tierloom.stages.memory.arena import Arena

_PATIENCE = 0.25
"""Seconds that a store waits for memory before slow branches of others give up what they have not
begun."""


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
        self, arena: Arena, chunk_bytes: int, in_arena: frozenset[str],
        send: Callable[[Batch], Awaitable[None]], shed: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        """`chunk_bytes`: what a chunk may need of the arena on its whole way. `in_arena`: tiers
        whose objects lie there. `send` brings a batch into the graph's body. `shed` has branches
        that may drop give up what waits in front of them."""
        self.chunk_bytes = chunk_bytes
        self._arena, self._send = arena, send
        self._shed = shed
        self.starved = 0
        """Stores that have waited too long for memory."""
        self._in_arena = in_arena
        self.model_went_on: asyncio.Queue[tuple[Request, Progress]] = asyncio.Queue()
        self.waiting: asyncio.Queue[tuple[Request, Progress]] = asyncio.Queue()

    async def admit(self, request: Request, progress: Progress) -> None:
        """Promise memory to the request's batches, in order, and let each one go as it has it.

        Waves need all of the request's memory until the last layer, so they get it in one promise:
        two requests must not each hold half of what both wait for.
        """
        progress.memory_asked = True
        storing = request.graph == "store"
        needs = [self._need(resources, storing) for resources in progress.batches]
        if request.layered:
            promised = await self._reserve(progress, sum(needs), storing)
        for resources, need in zip(progress.batches, needs, strict=True):
            if not request.layered:
                promised = await self._reserve(progress, need, storing)
            if promised:
                promises = self._arena.promises
                resources.closing.callback(partial(promises.unreserve, need, storing=storing))
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

    def _need(self, resources: BatchResources, storing: bool) -> int:
        """Bytes that a batch may lease. What lies in the arena is read where it is."""
        for chunk in () if storing else resources.chunks:
            first = chunk.source.tiers[:1] if chunk.source is not None else []
            chunk.room = chunk.object is None and self._in_arena.isdisjoint(first)
        return sum(chunk.room for chunk in resources.chunks) * self.chunk_bytes

    async def _reserve(self, progress: Progress, nbytes: int, storing: bool) -> bool:
        """Wait for a promise of memory; False when the request is cancelled, or asks too much."""
        promises = self._arena.promises
        if not nbytes or nbytes > promises.total:
            return not nbytes
        if storing and promises.try_store(nbytes):
            return True
        promised = False
        with anyio.CancelScope() as waiting:
            progress.cancels.add(waiting)
            try:
                async with anyio.create_task_group() as tasks:
                    if storing:
                        tasks.start_soon(self._shed_while_waiting)
                    await promises.reserve(nbytes, storing=storing)
                    promised = True
                    tasks.cancel_scope.cancel()
            finally:
                progress.cancels.discard(waiting)
        return promised

    async def _shed_while_waiting(self) -> None:
        await anyio.sleep(_PATIENCE)
        self.starved += 1
        try:
            await self._shed()
            await anyio.sleep_forever()
        finally:
            self.starved -= 1
