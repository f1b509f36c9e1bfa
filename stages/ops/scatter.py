"""scatter: verified frames into the engine's cache.

    place: {use: scatter}

A frame is checked and placed in one go, and a bad one is never placed: its chunk and those after
it are reported, and the engine computes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierloom.stages.contract.batch import Batch, Piece
from tierloom.stages.contract.stage import Lane, Stage
from tierloom.stages.errors import Damaged, Lost
from tierloom.stages.kv.object import Header
from tierloom.stages.ops import frame_copy
from tierloom.triton_kernels.memory.tables import CORRUPT, PLACED


@dataclass(frozen=True, kw_only=True, slots=True)
class ScatterOptions:
    """None: the layout settles it."""


class Scatter(Stage):
    """Places the wanted rows of each frame; opens the gates of layer groups by passing."""

    Options = ScatterOptions
    takes = "kv@any/frame"
    gives = "receipt@host/request"
    lane = Lane.POOL
    touches_engine = True

    def apply(self, batch: Batch) -> Batch:
        for trusted in (False, True):
            live = [p for p in batch.live if p.object is not None and self._trusted(p) == trusted]
            if live:
                self._place(batch, live, verify=not trusted)
        return batch

    def _trusted(self, piece: Piece) -> bool:
        """Decoded frames were verified before decoding; memory is trusted when told to."""
        return piece.plain is not None or piece.took <= self.ctx.trusted

    def _place(self, batch: Batch, live: list[Piece], *, verify: bool) -> None:
        jobs = [
            (p, o.header, o.lease.at(0, o.header.nbytes), batch.frames_of(o.header), p.take)
            for p in live
            if (o := p.plain or p.object) is not None
        ]
        frames = frame_copy.frame_table(self.ctx.geometry, jobs)
        frame_copy.scatter(batch.ticket, frames, self.ctx.device, verify=verify)
        if (frames.status == PLACED).all():
            for piece, header, *_ in jobs:
                self._placed(batch, piece, header)
            return
        at = 0
        for piece, header, _, part, _ in jobs:
            state = frames.status[at : at + len(part)]
            at += len(part)
            if (state == CORRUPT).any():
                batch.refuse(piece, Damaged("a frame's checksum does not match"))
            elif not (state == PLACED).all():
                batch.lose(piece, batch.ticket.cancelled or Lost.CANCELLED)
            else:
                self._placed(batch, piece, header)

    def _placed(self, batch: Batch, piece: Piece, header: Header) -> None:
        ours = header.group == batch.ticket.group
        if batch.ticket.done_with(piece, batch.frames if ours else range(batch.ticket.groups)):
            g = self.ctx.geometry
            piece.nbytes = g.frame_bytes(g.layers, piece.take)
