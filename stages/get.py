"""get: planned objects out of their tiers.

    fetch: {use: get, promote: hot, hedge: 20 ms}

Each object comes from the first tier of its plan that delivers it; what comes from a colder tier
and proves whole is promoted, in place: the lease it was read into becomes the memory tier's.

Of progressive objects all coarse scans are read first, and then as many finer ones as there is
time for (`adapt.py`). What was not read to its end is not promoted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import anyio

from .adapt import Outlook
from .base import LoopStage
from .errors import Lost
from .options import parse_seconds
from .tiers.base import Read

if TYPE_CHECKING:
    from .base import Context
    from .geometry import Geometry
    from .payload import Batch, Piece, Scope
    from .tiers.breaker import Guarded


@dataclass(frozen=True, kw_only=True, slots=True)
class GetOptions:
    """How to fetch."""

    promote: str | None = None
    """Memory tier that takes what a colder tier delivered."""
    hedge: Annotated[float, parse_seconds] | None = None
    """Ask the next tier that has an object when the first has not answered for this long."""
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
        by_tier: dict[str, list[Piece]] = {}
        for piece in pieces:
            by_tier.setdefault(piece.tiers[0], []).append(piece)
        again: list[Piece] = []
        async with anyio.create_task_group() as tg:
            for name, group in by_tier.items():
                tg.start_soon(self._from_tier, batch, name, group, again)
        return again

    async def _from_tier(
        self, batch: Batch, name: str, group: list[Piece], again: list[Piece]
    ) -> None:
        """Read a group from one tier; put what it lost, and another may have, on `again`."""
        tier = self.ctx.tiers[name]
        outlook = self._outlook(batch, group, tier)
        if self._enough(batch, group, outlook, tier):
            return
        reads = [Read(p.source, batch.frames.stop) for p in group]
        hedge = self.options.hedge if all(len(p.tiers) > 1 for p in group) else None
        patience = min(filter(None, (hedge, outlook.patience())), default=None)
        began = time.monotonic()
        try:
            with anyio.move_on_after(patience):
                await tier.read(reads)
                await self._rest(batch, name, reads)
            seconds = time.monotonic() - began
            came = []
            for piece, read in zip(group, reads, strict=True):
                code = _judge(batch, piece, read, self.ctx.geometry)
                if code is None:
                    piece.object, read.object = read.object, None  # the piece has the lease now
                    piece.took = {name}
                    batch.ticket.deliver(name)
                    came.append(piece)
                    continue
                piece.tiers = piece.tiers[1:]
                if piece.tiers:
                    again.append(piece)
                else:
                    batch.lose(piece, code)
            await self._finer(tier, came, outlook.after(seconds), seconds)
        finally:
            for read in reads:
                if read.object is not None:
                    read.object.lease.release()

    def _outlook(self, batch: Batch, group: list[Piece], tier: Guarded) -> Outlook:
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

    def _enough(self, batch: Batch, group: list[Piece], outlook: Outlook, tier: Guarded) -> bool:
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
        self, tier: Guarded, pieces: list[Piece], outlook: Outlook, seconds: float
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
        """The last frame has been placed, or given up: promote, quarantine, release."""
        del self._turns[id(scope)]
        promote, bad = [], []
        for piece in scope.pieces:
            if piece.object is None:
                continue
            tier = next(iter(piece.took))
            if piece.lost is Lost.CORRUPT:
                bad.append((tier, piece.source))
            elif tier != self.options.promote and piece.nbytes:  # placed to the last frame
                if piece.object.loaded < len(piece.object.header.frames):
                    continue
                piece.object.sealed = True
                promote.append(piece.object)
        try:
            for tier, key in bad:
                self.ctx.tiers[tier].counts.corrupt += 1
                await self.ctx.tiers[tier].drop([key])
            if promote and self.options.promote:
                await self.ctx.tiers[self.options.promote].put(promote)
        finally:
            for piece in scope.pieces:
                if piece.object is not None:
                    piece.object.lease.release()


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
