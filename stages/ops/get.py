"""get: planned objects out of their tiers.

    fetch: {use: get, promote: hot, hedge: 20 ms}

Each object comes from the first tier of its plan that delivers it; what comes from a colder tier
and proves whole is promoted, in place: the lease it was read into becomes the memory tier's.

Of progressive objects all coarse scans are read first, and then as many finer ones as there is
time for (`adapt.py`). What was not read to its end is not promoted.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import anyio

from tierloom.stages.contract.batch import Batch, Piece, Scope
from tierloom.stages.contract.stage import Context, LoopStage
from tierloom.stages.errors import Lost
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.ops.hedge import race
from tierloom.stages.ops.scan_budget import Outlook
from tierloom.stages.options import parse_seconds
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import Read


@dataclass(frozen=True, kw_only=True, slots=True)
class GetOptions:
    """How to fetch."""

    promote: str | None = None
    """Memory tier that takes what a colder tier delivered."""
    hedge: Annotated[float, parse_seconds] | None = None
    """Ask the next tier that has an object, too, when the first has not answered for this long, and
    take what comes first. Where there is no memory for both, the first is given up."""
    within: Annotated[float, parse_seconds] | None = None
    """Progressive objects: read as much of each as keeps this time to the first token, counted from
    the request's start. None: as much as comes before the deadline."""


class Get(LoopStage):
    """Reads the wanted frames of each chunk of a batch, tier by tier."""

    Options = GetOptions
    takes = "plan@host/request"
    gives = "bytes@host/frame"
    tier_options = arena_options = ("promote",)

    def __init__(self, options: GetOptions, ctx: Context) -> None:
        super().__init__(options, ctx)
        self._turns: dict[int, anyio.Lock] = {}
        self._ask_of = 1 if options.hedge is None else 2
        """How many tiers a piece is asked of at once, at most."""

    async def apply_async(self, batch: Batch) -> Batch:
        # Waves of the same chunks read into the same leases: one at a time, in order.
        lock = self._turns.get(id(batch.scope))
        if lock is None:
            lock = self._turns[id(batch.scope)] = anyio.Lock()
            batch.defer(partial(self._done, batch.scope))
        async with lock:
            known = [p for p in batch.live if p.object is not None]
            if known:
                await self._go_on(batch, known)
            fresh = [p for p in batch.live if p.object is None]
            while fresh:
                fresh = await self._fetch(batch, fresh)
        return batch

    async def _go_on(self, batch: Batch, pieces: list[Piece]) -> None:
        """Further frames of objects whose first ones have come, from the same tier."""
        by_tier: dict[str, list[Piece]] = {}
        for piece in pieces:
            assert piece.object is not None
            if piece.object.loaded < batch.frames_of(piece.object.header).stop:
                by_tier.setdefault(next(iter(piece.took)), []).append(piece)
        for name, group in by_tier.items():
            reads = [Read(p.source, batch.frames.stop, p.object) for p in group]
            await self.ctx.tiers[name].read(reads)
            for piece, read in zip(group, reads, strict=True):
                if read.lost is not None:
                    batch.lose(piece, read.lost)

    async def _fetch(self, batch: Batch, pieces: list[Piece]) -> list[Piece]:
        """Ask each piece's next tier; returns those that still have a tier to try."""
        by_tier: dict[tuple[str, ...], list[Piece]] = {}
        for piece in pieces:
            by_tier.setdefault(tuple(piece.tiers[: self._ask_of]), []).append(piece)
        again: list[Piece] = []
        async with anyio.create_task_group() as tg:
            for names, group in by_tier.items():
                tg.start_soon(self._from_tier, batch, names, group, again)
        return again

    async def _from_tier(
        self, batch: Batch, names: tuple[str, ...], group: list[Piece], again: list[Piece]
    ) -> None:
        """Read a group from the first tier, or the second that it is hedged with; put what was
        lost, and another tier may have, on `again`."""
        tier = self.ctx.tiers[names[0]]
        outlook = self._outlook(batch, group, tier)
        if self._enough(batch, group, outlook, tier):
            return
        began = time.monotonic()
        with ExitStack() as home:
            asked: dict[str, list[Read]] = {}
            ask = partial(self._ask, batch, group, asked, home)
            with anyio.move_on_after(outlook.patience()):
                if self.options.hedge is None or len(names) == 1:
                    await ask(names[0])
                else:
                    also = partial(self._also, names[1], ask, len(group), home)
                    await race(partial(ask, names[0]), also, self.options.hedge)
            seconds = time.monotonic() - began
            came = self._take(batch, group, asked, again)
        for name in asked:
            mine = [p for p in came if name in p.took]
            await self._finer(self.ctx.tiers[name], mine, outlook.after(seconds), seconds)

    async def _ask(
        self, batch: Batch, group: list[Piece], asked: dict[str, list[Read]], home: ExitStack,
        name: str,
    ) -> bool:  # fmt: skip
        """Read a group from one tier; whether all of it came. Leases that nobody takes go home."""
        reads = asked[name] = [Read(p.source, batch.frames.stop) for p in group]
        home.callback(_release, reads)
        await self.ctx.tiers[name].read(reads)
        await self._rest(batch, name, reads)
        pairs = zip(group, reads, strict=True)
        return all(_judge(batch, p, r, self.ctx.geometry) is None for p, r in pairs)

    async def _also(
        self, name: str, ask: Callable[[str], Awaitable[bool]], chunks: int, home: ExitStack
    ) -> bool:
        """The second of two reads. It needs memory that nobody was promised; where there is none,
        it says that all is done, so that the first makes room for it."""
        g, arena = self.ctx.geometry, self.ctx.arena
        if not self.ctx.tiers[name].in_arena:
            need = chunks * (g.frame_bytes(g.layers, self.ctx.chunk.tokens) + PAGE)
            if need > arena.spare:
                return True
            await arena.reserve(need)
            home.callback(arena.unreserve, need)
        return await ask(name)

    def _take(
        self, batch: Batch, group: list[Piece], asked: dict[str, list[Read]], again: list[Piece]
    ) -> list[Piece]:
        """Give each piece what came of it, from the first tier that delivered; return those."""
        came = []
        for i, piece in enumerate(group):
            code: Lost | None = Lost.LATE
            for name, reads in asked.items():
                code = _judge(batch, piece, reads[i], self.ctx.geometry)
                if code is Lost.BAD_LAYOUT:
                    self.ctx.tiers[name].unread.note(piece.source, code)
                if code is None:
                    piece.object, reads[i].object = reads[i].object, None  # its lease, too
                    piece.took = {name}
                    batch.ticket.deliver(name)
                    came.append(piece)
                    break
            else:
                piece.tiers = piece.tiers[len(asked) :]
                if piece.tiers:
                    again.append(piece)
                else:
                    batch.lose(piece, code or Lost.LATE)
        return came

    def _outlook(self, batch: Batch, group: list[Piece], tier: CircuitBreaker) -> Outlook:
        """What is known of a group of pieces before they are read."""
        ticket = batch.ticket
        here = sum(p.take for p in group)
        first = group[0].index
        behind = sum(p.take for p in ticket.pieces if p.index > first and p.object is None) - here
        now = time.monotonic()
        outlook = Outlook(ticket.deadline - now, tier.reads.per_byte, max(0, behind) / here)
        if self.options.within is None:
            return outlook
        left = min(outlook.left, ticket.started + self.options.within - now)
        if not ticket.prefill_rate:
            return outlook._replace(left=left)
        total = ticket.span.tokens if ticket.span else len(ticket.tokens)
        compute = (total - group[0].start) / ticket.prefill_rate
        ahead = total / ticket.prefill_rate - compute - (now - ticket.started)
        return outlook._replace(left=min(left, compute + ahead), compute=compute, ahead=ahead)

    def _enough(
        self, batch: Batch, group: list[Piece], outlook: Outlook, tier: CircuitBreaker
    ) -> bool:
        """Lose what is quicker to compute by now, and so all that lies behind it."""
        g, ticket = self.ctx.geometry, batch.ticket
        coarsest = tier.share * sum(g.frame_bytes(g.layers, p.take) for p in group)
        if outlook.hopeless(coarsest):
            ticket.enough = min(ticket.enough, group[0].index)
        late = [p for p in group if p.index >= ticket.enough]
        for piece in late:
            batch.lose(piece, Lost.LATE)
        return len(late) == len(group)

    async def _finer(
        self, tier: CircuitBreaker, pieces: list[Piece], outlook: Outlook, seconds: float
    ) -> None:
        """Progressive objects, whose coarsest scans took so many seconds: read one scan more of
        each, and one more, while there is time."""
        objects = [p.object for p in pieces if p.object and p.object.header.scans > 1]
        if not objects:
            return
        now, began = seconds / sum(o.arrived for o in objects), time.monotonic()
        for scan in range(2, max(o.header.scans for o in objects) + 1):
            reads = [Read(o.header.key, scan * o.header.groups, o) for o in objects]
            upto = sum(o.bytes_upto(r.upto) for o, r in zip(objects, reads, strict=True))
            later = outlook.after(time.monotonic() - began)
            if not later.finer(upto - sum(o.arrived for o in objects), upto, now):
                return
            with anyio.move_on_after(later.left):
                await tier.read(reads)
            if any(r.lost is not None for r in reads):
                return  # what has come will do

    async def _rest(self, batch: Batch, name: str, reads: list[Read]) -> None:
        """Load to the end what turns out to be cut into other layer groups than ours."""
        short = []
        for read in reads:
            if read.object is not None and read.lost is None:
                read.upto = batch.frames_of(read.object.header).stop
                if read.object.loaded < read.upto:
                    short.append(read)
        if short:
            await self.ctx.tiers[name].read(short)

    async def _done(self, scope: Scope) -> None:
        """The last frame has been placed, or given up: promote, drop what is damaged, release."""
        del self._turns[id(scope)]
        promote, bad = [], []
        for piece in scope.pieces:
            if piece.object is None:
                continue
            tier = next(iter(piece.took))
            if piece.refused is not None:
                bad.append((tier, piece.source, piece.refused, piece.object.header))
            elif piece.object.lease.arena is not self.ctx.arena:
                continue  # another process's memory, on this host: keeping it here gains nothing
            elif tier != self.options.promote and piece.nbytes:  # placed to the last frame
                if piece.object.loaded < len(piece.object.header.frames):
                    continue
                piece.object.sealed = True
                promote.append(piece.object)
        try:
            for tier, key, error, header in bad:
                await self.ctx.tiers[tier].refused(key, error, header)
            if promote and self.options.promote:
                await self.ctx.tiers[self.options.promote].put(promote)
        finally:
            for piece in scope.pieces:
                if piece.object is not None:
                    piece.object.lease.release()


def _release(reads: list[Read]) -> None:
    for read in reads:
        if read.object is not None:
            read.object.lease.release()
            read.object = None


def _judge(batch: Batch, piece: Piece, read: Read, geometry: Geometry) -> Lost | None:
    """Whether a tier delivered what was asked; None: it did."""
    if read.lost is not None:
        return read.lost
    if read.object is None:
        return Lost.LATE
    header = read.object.header
    if header.geometry != geometry or header.tokens < piece.take:
        return Lost.BAD_LAYOUT
    return Lost.LATE if read.object.loaded < batch.frames_of(header).stop else None
