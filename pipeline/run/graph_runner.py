"""One graph, running: queues between segments, a few workers each, and the end of every request.

Requests are data in batches, not tasks. Whatever happens to a batch (lost, late, cancelled, a
broken stage), it travels on to the end, so that gates open, leases are released and the request is
answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import anyio

from tierloom.pipeline.config.segments import Segment
from tierloom.pipeline.config.spec import Graph
from tierloom.pipeline.run.admission import Admission, Progress
from tierloom.pipeline.run.batching import split_into_batches
from tierloom.pipeline.run.meters import Meter
from tierloom.pipeline.run.stage_calls import stage_calls
from tierloom.pipeline.run.threads import Pool
from tierloom.stages.contract.batch import Batch, BatchResources
from tierloom.stages.contract.request import Request
from tierloom.stages.contract.stage import BatchStage, RequestStage, Stage
from tierloom.stages.errors import Lost
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.client_errors import is_failure

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

log = logging.getLogger("tierloom")

_BROKEN_LIMIT, _BROKEN_WINDOW = 5, 60.0


class GraphRunner:
    """Runs one graph's requests until its task group is cancelled; all of it on the loop."""

    def __init__(
        self, graph: Graph, segments: tuple[Segment, ...], stages: Mapping[str, Stage], *,
        pool: Pool, arena: Arena, in_arena: frozenset[str], object_bytes: int, frames: int,
        inflight: int,
    ) -> None:  # fmt: skip
        self.graph, self.segments = graph, segments
        self.meters = {n.id: Meter() for n in graph.nodes}
        self.open: dict[Request, Progress] = {}
        self.idle = asyncio.Event()
        """No request is open."""
        self.idle.set()
        self.answer: Callable[[Request], None] = Request.finish  # who counts requests replaces it
        self._dropped = [0] * len(segments)
        self._inflight, self._arena = inflight, arena
        forms = max(1, sum(n.cls.leases for n in graph.nodes))
        # What a codec adds to a frame fits a page: one that would not shrink passes as it is.
        chunk_bytes = object_bytes * forms + (forms - 1) * frames * PAGE
        self._object_bytes = object_bytes
        self._admission = Admission(arena, chunk_bytes, in_arena, self._enter, self._shed)
        self._head = [
            stage for s in segments if s.head for n in s.nodes
            if isinstance(stage := stages[n.id], RequestStage)
        ]  # fmt: skip
        self._finishers = [
            stage for n in graph.nodes
            if isinstance(stage := stages[n.id], BatchStage)
            and type(stage).finish is not BatchStage.finish
        ]  # fmt: skip
        self._calls = [stage_calls(s, stages, self.meters, pool) for s in segments]
        self._touching = [any(n.cls.touches_engine for n in s.nodes) for s in segments]
        self._body = tuple(
            i for i, s in enumerate(segments)
            if not s.head and (s.source is None or segments[s.source].head)
        )  # fmt: skip
        # asyncio's queues: a hop over an anyio stream costs six times as much. A head is bounded by
        # `inflight`, counted in submit(), a spilling queue by the arena.
        self._queues: list[asyncio.Queue[Any]] = [
            asyncio.Queue(0 if s.head or s.when_full == "spill" else s.depth) for s in segments
        ]
        self._timers: dict[Request, asyncio.TimerHandle] = {}
        self._broken_at: deque[float] = deque(maxlen=_BROKEN_LIMIT)

    # -- life ----------------------------------------------------------------------------------

    def start(self, tasks: TaskGroup) -> None:
        """Start the workers."""
        for i, segment in enumerate(self.segments):
            for n in range(segment.width):
                work = self._plan if segment.head else self._pass
                name = f"tierloom:{self.graph.name}:{segment.id}:{n}"
                tasks.start_soon(_work, work, i, self._queues[i], name=name)
        # Whoever waits for memory must not hold up the waves that will free it.
        a = self._admission
        for handle, inbox in ((a.emit, a.model_went_on), (a.admit, a.waiting)):
            tasks.start_soon(_admit, handle, inbox, name=f"tierloom:{self.graph.name}")

    def close(self) -> None:
        """Answer whatever is still open; the workers have ended."""
        for request in list(self.open):
            request.expire(Lost.CANCELLED)
            self._finish(request)

    def figures(self) -> dict[str, Any]:
        """Requests under way, chunks that were dropped, batches that wait in each wire."""
        each = zip(self.segments, self._queues, self._dropped, strict=True)
        wires = {s.id: {"depth": q.qsize(), "dropped": n} for s, q, n in each}
        said = {"open": len(self.open), "dropped": sum(self._dropped), "degraded": self.degraded}
        return {**said, "wires": wires}

    @property
    def degraded(self) -> bool:
        """Stages broke so often recently that this graph takes no requests."""
        full = len(self._broken_at) == _BROKEN_LIMIT
        return full and time.monotonic() - self._broken_at[0] < _BROKEN_WINDOW

    def submit(self, request: Request) -> None:
        """Take a request on; it is answered by its deadline, whatever happens."""
        if len(self.open) >= self._inflight or self.degraded or request.cancelled is not None:
            request.tally(Lost.BROKEN if self.degraded else request.cancelled or Lost.FULL)
            request.expire(Lost.FULL)
            self.answer(request)
            return
        self.open[request] = Progress(set(), [])
        self.idle.clear()
        self._watch(request)
        self._queues[0].put_nowait(request)

    def _watch(self, request: Request) -> None:
        """Cancel a request at its deadline, which a model that goes on moves."""
        loop = asyncio.get_running_loop()
        if loop.time() < request.deadline:
            self._timers[request] = loop.call_at(request.deadline, self._watch, request)
        else:
            self._cancel(request, Lost.LATE)

    def poke(self, request: Request) -> None:
        """The model went on a layer group, or the caller cancelled the request."""
        if (progress := self.open.get(request)) is not None:
            if request.cancelled is not None:
                self._cancel(request, request.cancelled)
            else:
                self._admission.model_went_on.put_nowait((request, progress))

    def _cancel(self, request: Request, code: Lost) -> None:
        request.expire(code)
        if (progress := self.open.get(request)) is not None:
            for scope in progress.cancels:
                scope.cancel()
            request.allowed = request.groups  # what was not sent yet must still pass, to be counted
            self._admission.model_went_on.put_nowait((request, progress))

    def peek(self, request: Request) -> None:
        """Plan a request from what this process knows: any thread, no I/O, nothing changed."""
        for stage in self._head:
            stage.peek(request)

    async def plan(self, request: Request) -> int:
        """Plan a request without running it; tokens that it would bring."""
        with anyio.move_on_at(request.deadline):
            for i, segment in enumerate(self.segments):
                for call in self._calls[i] if segment.head else ():
                    await call(request)
        return sum(c.wanted for c in request.chunks)

    # -- the head: whole requests ----------------------------------------------------------------

    async def _plan(self, i: int, request: Request) -> None:
        readers = self.segments[i].readers
        if not await self._guarded(i, request, request):
            request.tally(request.cancelled or Lost.BROKEN, max(1, len(request.chunks)))
            request.chunks = []
        elif readers and self.segments[readers[0]].head:
            await self._queues[readers[0]].put(request)
            return
        progress = self.open[request]
        progress.batches = split_into_batches(
            request, self._object_bytes, self._admission.chunk_bytes, self._arena.working
        )
        progress.batches_open = len(progress.batches)
        request.expect(len(progress.batches))
        request.planned.set()
        if not progress.batches:
            self._finish(request)
        elif request.layered or request.allowed == request.groups:
            await self._admission.admit(request, progress)
        # else the model has yet to compute what is to be stored: admission goes on with it

    async def _enter(self, batch: Batch) -> None:
        await self._send(self._body, batch)

    # -- the body: batches of chunks -------------------------------------------------------------

    async def _pass(self, i: int, batch: Batch) -> None:
        segment, request = self.segments[i], batch.request
        if batch.live and not await self._guarded(i, request, batch):
            for chunk in batch.live:
                batch.lose(chunk, request.cancelled or Lost.BROKEN)
        prefix = request.graph == "retrieve" and request.blend is None
        if prefix or self.graph.options.on_error == "skip":
            _lose_after(batch)
        if self._touching[i]:
            batch.leave_engine()
        if segment.readers:
            await self._send(segment.readers, batch)
        else:
            await self._leave(batch)

    async def _guarded(self, i: int, request: Request, item: Request | Batch) -> bool:
        """Run a segment's stages inside the request's deadline. False: cut short, or broken."""
        if request.cancelled is not None:
            return False
        scope = anyio.CancelScope()  # _cancel cancels it, at the deadline or before
        cancels = self.open[request].cancels
        cancels.add(scope)
        try:
            with scope:
                for call in self._calls[i]:
                    await call(item)
        except BaseException as error:
            if not is_failure(error):
                raise
            self._broken(i, error)
            return False
        finally:
            cancels.discard(scope)
        if scope.cancelled_caught:
            request.expire(Lost.LATE)
        return not scope.cancelled_caught

    def _broken(self, i: int, error: BaseException) -> None:
        segment = self.segments[i]
        meter = self.meters[segment.nodes[0].id]
        meter.broken += 1
        if meter.broken == 1:
            log.error(
                "stage broke: graph=%s segment=%s", self.graph.name, segment.id, exc_info=error
            )
        self._broken_at.append(time.monotonic())

    async def _send(self, readers: tuple[int, ...], batch: Batch) -> None:
        """On to the next segments; a branch that may drop is served before one that may block."""
        parts = [batch] if len(readers) == 1 else [batch.fork() for _ in readers]
        batch.resources.open += len(parts) - 1
        blocking = []
        for reader, part in zip(readers, parts, strict=True):
            may_drop = self.segments[reader].when_full == "drop"
            if may_drop and (self._queues[reader].full() or self._admission.starved):
                await self._drop(reader, part)
            elif self._queues[reader].full():
                blocking.append((reader, part))
            else:
                self._queues[reader].put_nowait(part)
        for reader, part in blocking:
            await self._queues[reader].put(part)

    async def _drop(self, i: int, batch: Batch) -> None:
        self._dropped[i] += len(batch.live)
        for chunk in batch.live:
            batch.lose(chunk, Lost.FULL)
        await self._leave(batch)

    async def _shed(self) -> None:
        """Stores wait for memory: branches that may drop give up what they have not begun."""
        for i, segment in enumerate(self.segments):
            while segment.when_full == "drop" and not self._queues[i].empty():
                await self._drop(i, self._queues[i].get_nowait())

    # -- the end ---------------------------------------------------------------------------------

    async def _leave(self, batch: Batch) -> None:
        """A branch or wave has ended; after the last one, all that the batch holds is released."""
        batch.leave_engine()
        resources = batch.resources
        resources.open -= 1
        if resources.open:
            return
        with anyio.CancelScope(shield=True):
            await self._release(resources)
        progress = self.open[batch.request]
        progress.batches_open -= 1
        if not progress.batches_open:
            self._finish(batch.request)

    async def _release(self, resources: BatchResources) -> None:
        """What stages do at the end of their chunks, and then their leases."""
        try:
            with resources.closing:
                for stage in self._finishers:
                    await stage.finish(resources.chunks)
        except BaseException as error:
            if not is_failure(error):
                raise
            log.exception("a batch did not end as it should: graph=%s", self.graph.name)

    def _finish(self, request: Request) -> None:
        self.open.pop(request, None)
        timer = self._timers.pop(request, None)
        if timer is not None:
            timer.cancel()
        self.answer(request)
        if not self.open:
            self.idle.set()


async def _work(
    handle: Callable[[int, Any], Awaitable[None]], i: int, inbox: asyncio.Queue[Any]
) -> None:
    while True:
        await handle(i, await inbox.get())


async def _admit(
    handle: Callable[[Request, Progress], Awaitable[None]],
    inbox: asyncio.Queue[tuple[Request, Progress]],
) -> None:
    while True:
        await handle(*await inbox.get())


def _lose_after(batch: Batch) -> None:
    """Once a chunk is lost, those after it are useless: spare the work."""
    first = min((c.index for c in batch.resources.chunks if c.lost is not None), default=None)
    if first is not None:
        for chunk in batch.request.chunks:
            if chunk.index > first and chunk.lost is None:
                chunk.lost = Lost.BEHIND
