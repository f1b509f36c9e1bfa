"""get: planned objects out of their tiers.

    fetch: {use: get, promote: hot, hedge: 20 ms}

Each object comes from the first tier of its plan that delivers it. When a batch is done, what came
whole from a colder tier is promoted, and what turned out damaged is deleted (`promote.py`).

Of progressive objects all coarse scans are read first, and then as many finer ones as there is
time for (`scan_budget.py`).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import anyio

from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.chunks import Chunk, Source
from tierloom.stages.contract.stage import BatchStage, Context
from tierloom.stages.errors import Lost
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.object import LINK, Object, object_bytes
from tierloom.stages.ops.promote import settle
from tierloom.stages.ops.scan_budget import ScanBudget
from tierloom.stages.options import Seconds
from tierloom.stages.passages.anywhere import extend, why_foreign
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.hedge import race
from tierloom.stages.tiers.contract.tier import Read


@dataclass(frozen=True, kw_only=True, slots=True)
class GetOptions:
    """How to fetch."""

    promote: str | None = None
    """Memory tier that takes what a colder tier delivered."""
    hedge: Seconds | None = None
    """Ask the next tier that has an object, too, when the first has not answered for this long, and
    take what comes first. Where there is no memory for both, the first is cancelled."""
    within: Seconds | None = None
    """Progressive objects: read as much of each as keeps this time to the first token, counted from
    the request's start. Default: as much as comes before the deadline."""


class Get(BatchStage):
    """Reads the wanted frames of each chunk of a batch, tier by tier."""

    Options = GetOptions
    takes = "plan@host/request"
    gives = "bytes@host/frame"
    tier_options = arena_options = ("promote",)
    leases = 1

    def __init__(self, options: GetOptions, ctx: Context) -> None:
        super().__init__(options, ctx)
        self._tiers_at_once = 1 if options.hedge is None else 2
        cut = ctx.chunk
        self._need = object_bytes(ctx.geometry, cut.tokens, cut.grain, cut.group)
        """Bytes of the arena for one object."""

    async def apply(self, batch: Batch) -> None:
        # Waves of the same chunks read into the same leases: one at a time, in order.
        async with batch.resources.lock:
            known = [c for c in batch.live if c.object is not None]
            if known:
                await self._continue(batch, known)
            fresh = [c for c in batch.live if c.object is None]
            while fresh:
                fresh = await self._fetch(batch, fresh)

    async def finish(self, chunks: list[Chunk]) -> None:
        """Promote what came whole, delete what was damaged."""
        await settle(chunks, self.ctx.tiers, self.options.promote, self.ctx.arena)

    async def _continue(self, batch: Batch, chunks: list[Chunk]) -> None:
        """Further frames of objects whose first ones have come, from the same tier."""
        by_tier: dict[str, list[tuple[Chunk, Read]]] = {}
        for chunk in chunks:
            source, object = _source(chunk), chunk.object
            assert object is not None
            if object.loaded < batch.frames_of(object.header).stop:
                read = Read(source.key, batch.frames.stop, object)
                by_tier.setdefault(next(iter(chunk.took)), []).append((chunk, read))
        for name, group in by_tier.items():
            await self.ctx.tiers[name].read([read for _, read in group])
            for chunk, read in group:
                if read.lost is not None:
                    batch.lose(chunk, read.lost)

    async def _fetch(self, batch: Batch, chunks: list[Chunk]) -> list[Chunk]:
        """Ask each chunk's next tier; returns those that still have a tier to try."""
        by_tier: dict[tuple[str, ...], list[Chunk]] = {}
        for chunk in chunks:
            if not self._has_room(batch, chunk):
                batch.lose(chunk, Lost.NO_ROOM)
                continue
            names = tuple(_source(chunk).tiers[: self._tiers_at_once])
            by_tier.setdefault(names, []).append(chunk)
        again: list[Chunk] = []
        if len(by_tier) == 1:  # a task group costs as much as a memory tier
            ((names, group),) = by_tier.items()
            await self._from_tier(batch, names, group, again)
            return again
        async with anyio.create_task_group() as tg:
            for names, group in by_tier.items():
                tg.start_soon(self._from_tier, batch, names, group, again)
        return again

    def _has_room(self, batch: Batch, chunk: Chunk) -> bool:
        """Memory is promised for a chunk, or not needed. For one that has gone from the arena since
        it was planned, none was."""
        if chunk.room or self.ctx.tiers[_source(chunk).tiers[0]].in_arena:
            return True
        return batch.reserve(self.ctx.arena, self._need)

    async def _from_tier(
        self, batch: Batch, names: tuple[str, ...], group: list[Chunk], again: list[Chunk]
    ) -> None:
        """Read a group from the first tier, or the second that it is hedged with; put what was
        lost, and another tier may have, on `again`."""
        tier = self.ctx.tiers[names[0]]
        budget = self._budget(batch, group, tier)
        if self._compute_instead(batch, group, budget, tier):
            return
        began = time.monotonic()
        with ExitStack() as untaken:
            asked: dict[str, list[Read]] = {}
            ask = partial(self._ask, batch, group, asked, untaken)
            with anyio.move_on_after(budget.patience()):
                if self.options.hedge is None or len(names) == 1:
                    await ask(names[0])
                else:
                    second = partial(self._ask_second, names[1], ask, len(group), untaken)
                    await race(partial(ask, names[0]), second, self.options.hedge)
            seconds = time.monotonic() - began
            came = self._take(batch, group, asked, again)
        for name in asked:
            mine = [c for c in came if name in c.took]
            await self._finer(self.ctx.tiers[name], mine, budget.after(seconds), seconds)

    async def _ask(
        self, batch: Batch, group: list[Chunk], asked: dict[str, list[Read]], untaken: ExitStack,
        name: str,
    ) -> bool:  # fmt: skip
        """Read a group from one tier; whether all of it came. `untaken` releases the leases that
        nobody takes."""
        reads = asked[name] = [Read(_source(c).key, batch.frames.stop) for c in group]
        untaken.callback(_release, reads)
        await self.ctx.tiers[name].read(reads)
        await self._rest(batch, name, reads)
        pairs = zip(group, reads, strict=True)
        return all(_why_lost(batch, c, r, self.ctx.geometry) is None for c, r in pairs)

    async def _ask_second(
        self, name: str, ask: Callable[[str], Awaitable[bool]], chunks: int, untaken: ExitStack
    ) -> bool:
        """The second of two reads. It needs memory that nobody was promised; where there is none,
        it says that all is done, so that the first makes room for it."""
        arena = self.ctx.arena
        if not self.ctx.tiers[name].in_arena:
            need = chunks * self._need
            if not arena.promises.try_reserve(need):
                return True
            untaken.callback(arena.promises.unreserve, need)
        return await ask(name)

    def _take(
        self, batch: Batch, group: list[Chunk], asked: dict[str, list[Read]], again: list[Chunk]
    ) -> list[Chunk]:
        """Give each chunk what came of it, from the first tier that delivered; return those."""
        came = []
        for i, chunk in enumerate(group):
            source = _source(chunk)
            code: Lost | None = Lost.LATE
            for name, reads in asked.items():
                code = _why_lost(batch, chunk, reads[i], self.ctx.geometry)
                if code is Lost.BAD_LAYOUT:
                    self.ctx.tiers[name].unread.note(source.key, code)
                object = reads[i].object
                if code is None and object is not None:
                    chunk.object, reads[i].object = object, None  # its lease, too
                    batch.defer(object.lease.release)
                    chunk.took = {name}
                    if chunk.excerpt is not None:
                        extend(batch.request, chunk, object.header)
                    batch.request.deliver(name)
                    came.append(chunk)
                    break
            else:
                del source.tiers[: len(asked)]
                if source.tiers:
                    again.append(chunk)
                else:
                    batch.lose(chunk, code or Lost.LATE)
        return came

    def _budget(self, batch: Batch, group: list[Chunk], tier: CircuitBreaker) -> ScanBudget:
        """What is known of a group of chunks before they are read."""
        request = batch.request
        here = sum(c.wanted for c in group)
        first = group[0].index
        unread = (c for c in request.chunks if c.index > first and c.object is None)
        remaining = sum(c.wanted for c in unread) - here
        now = time.monotonic()
        budget = ScanBudget(
            request.deadline - now, tier.reads.per_byte, max(0, remaining) / here
        )  # fmt: skip
        if self.options.within is None:
            return budget
        left = min(budget.time_left, request.started + self.options.within - now)
        if not request.prefill_rate:
            return budget._replace(time_left=left)
        total = request.span.tokens if request.span else len(request.tokens)
        compute = (total - group[0].start) / request.prefill_rate
        lead = total / request.prefill_rate - compute - (now - request.started)
        return budget._replace(time_left=min(left, compute + lead), compute=compute, lead=lead)

    def _compute_instead(
        self, batch: Batch, group: list[Chunk], budget: ScanBudget, tier: CircuitBreaker
    ) -> bool:
        """Lose what is quicker to compute by now, and so all after it; whether nothing is left."""
        g, request = self.ctx.geometry, batch.request
        if request.blend is not None:  # what is lost says nothing of what stands behind it
            return False
        coarsest = tier.share * sum(g.frame_bytes(g.layers, c.wanted) for c in group)
        if budget.hopeless(coarsest):
            request.compute_from = min(request.compute_from, group[0].index)
        late = [c for c in group if c.index >= request.compute_from]
        for chunk in late:
            batch.lose(chunk, Lost.LATE)
        return len(late) == len(group)

    async def _finer(
        self, tier: CircuitBreaker, chunks: list[Chunk], budget: ScanBudget, seconds: float
    ) -> None:
        """Progressive objects, whose coarsest scans took `seconds`: read one scan more of each, and
        one more, while there is time."""
        objects: list[Object] = [c.object for c in chunks if c.object and c.object.header.scans > 1]
        if not objects:
            return
        now, began = seconds / sum(o.arrived for o in objects), time.monotonic()
        for scan in range(2, max(o.header.scans for o in objects) + 1):
            reads = [Read(o.header.key, scan * o.header.groups, o) for o in objects]
            upto = sum(o.bytes_upto(r.upto) for o, r in zip(objects, reads, strict=True))
            later = budget.after(time.monotonic() - began)
            if not later.finer(upto - sum(o.arrived for o in objects), upto, now):
                return
            with anyio.move_on_after(later.time_left):
                await tier.read(reads)
            if any(r.lost is not None for r in reads):
                return  # what has come will do

    async def _rest(self, batch: Batch, name: str, reads: list[Read]) -> None:
        """Load to the end what turns out to be split into other layer groups than ours."""
        short = []
        for read in reads:
            if read.object is not None and read.lost is None:
                read.upto = batch.frames_of(read.object.header).stop
                if read.object.loaded < read.upto:
                    short.append(read)
        if short:
            await self.ctx.tiers[name].read(short)


def _source(chunk: Chunk) -> Source:
    assert chunk.source is not None, "lookup plans no chunk without a source"
    return chunk.source


def _release(reads: list[Read]) -> None:
    for read in reads:
        if read.object is not None:
            read.object.lease.release()
            read.object = None


def _why_lost(batch: Batch, chunk: Chunk, read: Read, geometry: Geometry) -> Lost | None:
    """Why a tier did not deliver what was asked; None: it did."""
    if read.lost is not None:
        return read.lost
    if read.object is None:
        return Lost.LATE
    header = read.object.header
    if header.geometry != geometry:
        return Lost.BAD_LAYOUT
    late = Lost.LATE if read.object.loaded < batch.frames_of(header).stop else None
    if chunk.excerpt is not None:
        return why_foreign(batch.request, chunk, header) or late
    if header.tokens < chunk.wanted:
        return Lost.BAD_LAYOUT
    wanted = -(-chunk.wanted // header.grain) * LINK
    if header.links[:wanted] != chunk.links[:wanted]:  # it begins elsewhere in the text
        return Lost.BAD_LAYOUT
    return late
