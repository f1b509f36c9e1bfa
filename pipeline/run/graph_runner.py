"""One lowered graph, running: wires between segments, a few workers each, and the road home.

Requests are tickets in batches, not tasks. Whatever happens to a batch (lost, late, cancelled, a
broken stage), it travels on to the end, so that gates open, leases go home and the request is
answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from tierloom.pipeline.config.segments import Segment
from tierloom.pipeline.config.spec import Graph
from tierloom.pipeline.run.batching import cut
from tierloom.pipeline.run.meters import Meter
from tierloom.pipeline.run.stage_calls import steps
from tierloom.pipeline.run.threads import Pool
from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.request import Ticket
from tierloom.stages.contract.stage import LoopStage, Stage
from tierloom.stages.errors import ArenaFull, Lost
from tierloom.stages.memory.arena import Arena

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

log = logging.getLogger("tierloom")

_BROKEN_LIMIT, _BROKEN_WINDOW = 5, 60.0


class Flow:
    """Runs one graph's requests until its task group is cancelled; all of it on the loop."""

    def __init__(
        self, graph: Graph, segments: tuple[Segment, ...], stages: Mapping[str, Stage], *,
        pool: Pool, arena: Arena, object_bytes: int, inflight: int,
    ) -> None:  # fmt: skip
        self.graph, self.segments = graph, segments
        self.meters = {n.id: Meter() for n in graph.nodes}
        self.open: dict[Ticket, set[anyio.CancelScope]] = {}
        self.idle = asyncio.Event()
        """No request is open."""
        self.idle.set()
        self.dropped = 0
        self._inflight = inflight
        self._arena = arena
        self._piece_bytes = object_bytes * max(1, sum(n.cls.leases for n in graph.nodes))
        """What a chunk may need of the arena on its whole way."""
        self._head = [stages[n.id] for s in segments if s.head for n in s.nodes]
        self._steps = [steps(s, stages, self.meters, pool) for s in segments]
        self._touching = [any(n.cls.touches_engine for n in s.nodes) for s in segments]
        self._body = tuple(
            i for i, s in enumerate(segments)
            if not s.head and (s.source is None or segments[s.source].head)
        )  # fmt: skip
        # asyncio's queues: a hop over an anyio stream costs six times as much. A head is bounded by
        # `inflight`, counted in submit(), a spilling wire by the arena.
        self._wires: list[asyncio.Queue[Any]] = [
            asyncio.Queue(0 if s.head or s.when_full == "spill" else s.depth) for s in segments
        ]
        self._pokes: asyncio.Queue[Ticket] = asyncio.Queue()
        self._waiting: asyncio.Queue[Ticket] = asyncio.Queue()
        self._timers: dict[Ticket, asyncio.TimerHandle] = {}
        self._broken_at: deque[float] = deque(maxlen=_BROKEN_LIMIT)

    # -- life ----------------------------------------------------------------------------------

    def start(self, tasks: TaskGroup) -> None:
        """Set the workers to work."""
        for i, segment in enumerate(self.segments):
            for n in range(segment.width):
                work = self._plan if segment.head else self._pass
                name = f"tierloom:{self.graph.name}:{segment.id}:{n}"
                tasks.start_soon(_work, work, i, self._wires[i], name=name)
        # Whoever waits for memory must not hold up the waves that will free it.
        for handle, inbox in ((self._emit, self._pokes), (self._admit, self._waiting)):
            tasks.start_soon(_work, handle, 0, inbox, name=f"tierloom:{self.graph.name}")

    def close(self) -> None:
        """Answer whatever is still open; the workers have ended."""
        for ticket in list(self.open):
            ticket.expire(Lost.CANCELLED)
            self._finish(ticket)

    @property
    def degraded(self) -> bool:
        """Stages broke so often of late that this graph stands aside."""
        full = len(self._broken_at) == _BROKEN_LIMIT
        return full and time.monotonic() - self._broken_at[0] < _BROKEN_WINDOW

    def submit(self, ticket: Ticket) -> None:
        """Take a request on; it is answered by its deadline, whatever happens."""
        if len(self.open) >= self._inflight or self.degraded or ticket.cancelled is not None:
            ticket.tally(Lost.BROKEN if self.degraded else ticket.cancelled or Lost.FULL)
            ticket.expire(Lost.FULL)
            ticket.finish()
            return
        self.open[ticket] = set()
        self.idle.clear()
        self._watch(ticket)
        self._wires[0].put_nowait(ticket)

    def _watch(self, ticket: Ticket) -> None:
        """Give a request up at its deadline, which a model that goes on moves."""
        loop = asyncio.get_running_loop()
        if loop.time() < ticket.deadline:
            self._timers[ticket] = loop.call_at(ticket.deadline, self._watch, ticket)
        else:
            self._give_up(ticket, Lost.LATE)

    def poke(self, ticket: Ticket) -> None:
        """The engine went on a layer group, or gave the request up."""
        if ticket in self.open:
            if ticket.cancelled is not None:
                self._give_up(ticket, ticket.cancelled)
            else:
                self._pokes.put_nowait(ticket)

    def _give_up(self, ticket: Ticket, code: Lost) -> None:
        ticket.expire(code)
        for scope in self.open.get(ticket, ()):
            scope.cancel()
        ticket.allowed = ticket.groups  # what was not sent yet must still pass, to be counted
        self._pokes.put_nowait(ticket)

    def peek(self, ticket: Ticket) -> None:
        """Plan a request from what this process knows: any thread, no I/O, nothing changed."""
        for stage in self._head:
            if isinstance(stage, LoopStage):
                stage.peek(ticket)
            else:
                stage.plan(ticket)

    async def plan(self, ticket: Ticket) -> int:
        """Plan a request without running it; tokens that it would bring."""
        with anyio.move_on_at(ticket.deadline):
            for i, segment in enumerate(self.segments):
                for step in self._steps[i] if segment.head else ():
                    await step(ticket)
        return sum(p.take for p in ticket.pieces)

    # -- the head: whole requests ----------------------------------------------------------------

    async def _plan(self, i: int, ticket: Ticket) -> None:
        readers = self.segments[i].readers
        if not await self._guarded(i, ticket, ticket):
            ticket.tally(ticket.cancelled or Lost.BROKEN, max(1, len(ticket.pieces)))
            ticket.pieces = []
        elif readers and self.segments[readers[0]].head:
            await self._wires[readers[0]].put(ticket)
            return
        ticket.expect(cut(ticket, self._piece_bytes, self._arena.working))
        if not ticket.scopes:
            self._finish(ticket)
        elif ticket.layered or ticket.allowed == ticket.groups:
            await self._admit(i, ticket)
        # else the model has yet to compute what is to be stored: _emit goes on

    async def _admit(self, _: int, ticket: Ticket) -> None:
        """Promise memory to the request's batches, in order, and let each one go as it has it.

        Waves need all of the request's memory until the last layer, so they get it in one promise:
        two requests must not each hold half of what both wait for.
        """
        ticket.admitted = True
        if ticket.layered:
            has = await self._reserve(ticket, len(ticket.pieces) * self._piece_bytes)
        for scope in ticket.scopes:
            need = len(scope.pieces) * self._piece_bytes
            if not ticket.layered:
                has = await self._reserve(ticket, need)
            if has:
                scope.defer(partial(self._arena.unreserve, need))
            elif ticket.cancelled is None:
                for piece in scope.pieces:
                    piece.lost = Lost.NO_ROOM
                    ticket.tally(Lost.NO_ROOM)
            if not ticket.layered:
                await self._send(self._body, Batch(ticket, scope, range(ticket.groups)))
        if ticket.layered:
            ticket.promised = True
            self._pokes.put_nowait(ticket)

    async def _reserve(self, ticket: Ticket, nbytes: int) -> bool:
        """Wait for a promise of memory; False when the request is given up, or asks too much."""
        with anyio.CancelScope() as waiting:
            self.open[ticket].add(waiting)
            try:
                await self._arena.reserve(nbytes)
            except ArenaFull:
                return False
            finally:
                self.open[ticket].discard(waiting)
        return not waiting.cancelled_caught

    async def _emit(self, _: int, ticket: Ticket) -> None:
        """The engine went on: send the waves that its position allows, or all when it is done."""
        if not ticket.layered:
            if ticket.scopes and not ticket.admitted and ticket.allowed == ticket.groups:
                ticket.admitted = True
                self._waiting.put_nowait(ticket)
            return
        while ticket.promised and ticket.emitted < ticket.allowed:
            frames = range(ticket.emitted, ticket.emitted + 1)
            ticket.emitted += 1
            for scope in ticket.scopes:
                await self._send(self._body, Batch(ticket, scope, frames))

    # -- the body: batches of chunks -------------------------------------------------------------

    async def _pass(self, i: int, batch: Batch) -> None:
        segment, ticket = self.segments[i], batch.ticket
        if batch.live and not await self._guarded(i, ticket, batch):
            for piece in batch.live:
                batch.lose(piece, ticket.cancelled or Lost.BROKEN)
        if ticket.graph == "retrieve" or self.graph.options.on_error == "skip":
            _lose_behind(batch)
        if self._touching[i]:
            ticket.passed(batch)
        if segment.readers:
            await self._send(segment.readers, batch)
        else:
            await self._leave(batch)

    async def _guarded(self, i: int, ticket: Ticket, item: Ticket | Batch) -> bool:
        """Run a segment's stages inside the request's deadline. False: cut short, or broken."""
        if ticket.cancelled is not None:
            return False
        scope = anyio.CancelScope()  # _give_up cancels it, at the deadline or before
        self.open[ticket].add(scope)
        try:
            with scope:
                for step in self._steps[i]:
                    await step(item)
        except Exception as error:
            self._broken(i, error)
            return False
        finally:
            self.open[ticket].discard(scope)
        if scope.cancelled_caught:
            ticket.expire(Lost.LATE)
        return not scope.cancelled_caught

    def _broken(self, i: int, error: Exception) -> None:
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
        batch.scope.open += len(parts) - 1
        blocking = []
        for reader, part in zip(readers, parts, strict=True):
            try:
                self._wires[reader].put_nowait(part)
            except asyncio.QueueFull:  # noqa: PERF203
                if self.segments[reader].when_full == "drop":
                    await self._drop(part)
                else:
                    blocking.append((reader, part))
        for reader, part in blocking:
            await self._wires[reader].put(part)

    async def _drop(self, batch: Batch) -> None:
        self.dropped += len(batch.live)
        for piece in batch.live:
            batch.lose(piece, Lost.FULL)
        await self._leave(batch)

    async def _leave(self, batch: Batch) -> None:
        """A branch has ended; behind the last one of a scope, everything goes home."""
        batch.ticket.passed(batch)
        scope = batch.scope
        scope.open -= 1
        if scope.open:
            return
        with anyio.CancelScope(shield=True):
            while (give_back := scope.pop()) is not None:
                try:
                    waits = give_back()
                    if waits is not None:
                        await waits
                except Exception:  # noqa: PERF203
                    log.exception("giving back failed: graph=%s", self.graph.name)
        ticket = batch.ticket
        ticket.scopes_open -= 1
        if not ticket.scopes_open:
            self._finish(ticket)

    def _finish(self, ticket: Ticket) -> None:
        self.open.pop(ticket, None)
        timer = self._timers.pop(ticket, None)
        if timer is not None:
            timer.cancel()
        ticket.finish()
        if not self.open:
            self.idle.set()


async def _work(
    handle: Callable[[int, Any], Awaitable[None]], i: int, inbox: asyncio.Queue[Any]
) -> None:
    while True:
        await handle(i, await inbox.get())


def _lose_behind(batch: Batch) -> None:
    """Once a chunk is lost, those behind it are of no use: spare the work."""
    first = min((p.index for p in batch.scope.pieces if p.lost is not None), default=None)
    if first is not None:
        for piece in batch.ticket.pieces:
            if piece.index > first and piece.lost is None:
                piece.lost = Lost.BEHIND
