"""gather: the engine's cache into frames, checksummed while they are hot.

    pack: {use: gather}

A chunk's frames lie in one lease from the start, behind room for its header.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np

from tierloom.stages.contract.batch import Batch, Piece
from tierloom.stages.contract.request import Ticket
from tierloom.stages.contract.stage import Context, Lane, Stage
from tierloom.stages.errors import ArenaFull, Lost
from tierloom.stages.kv.object import LINK, Frame, Header, Object, header_size, plan_frames
from tierloom.stages.memory.allocator import PAGE, aligned
from tierloom.stages.memory.arena import Lease
from tierloom.stages.ops import frame_copy

UNKNOWN = bytes(32)
"""Token digest of a chunk whose caller named it and did not say its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatherOptions:
    """None: the layout settles it."""


class Gather(Stage):
    """Copies the chunks of a batch, layer group by layer group, into one lease per chunk."""

    Options = GatherOptions
    takes = "plan@host/request"
    gives = "kv@device/frame"
    lane = Lane.POOL
    touches_engine = True
    leases = 1

    def __init__(self, options: GatherOptions, ctx: Context) -> None:
        super().__init__(options, ctx)
        g, group = ctx.geometry, ctx.chunk.group
        self.layers = [min(group, g.layers - at) for at in range(0, g.layers, group)]
        self._plan = lru_cache(256)(self._plan_of)

    async def prepare(self, batch: Batch) -> None:
        """Lease memory for whole objects when their first frames come."""
        for piece in batch.live:
            if piece.object is not None:
                continue
            header = self._header(batch.ticket, piece)
            try:
                lease = self.ctx.arena.lease(header.nbytes)
            except ArenaFull:
                batch.lose(piece, Lost.NO_ROOM)
                continue
            batch.defer(lease.release)
            _blank_padding(header, lease)
            piece.object = Object(header, lease)
            piece.nbytes = sum(f.raw for f in header.frames)
            piece.checksums = np.zeros(len(self.layers), np.uint64)

    def apply(self, batch: Batch) -> Batch:
        live = [p for p in batch.live if p.object is not None]
        jobs = [
            (p, o.header, o.lease.at(0, o.header.nbytes), batch.frames, p.tokens)
            for p in live
            if (o := p.object) is not None
        ]
        if not jobs:
            return batch
        frames = frame_copy.frame_table(self.ctx.geometry, jobs)
        if not frame_copy.gather(batch.ticket, frames, self.ctx.device):
            for piece in live:
                batch.lose(piece, batch.ticket.cancelled or Lost.CANCELLED)
            return batch
        part, n = slice(batch.frames.start, batch.frames.stop), len(batch.frames)
        for i, piece in enumerate(live):
            assert piece.checksums is not None
            assert piece.object is not None
            piece.checksums[part] = frames.checksum[i * n : (i + 1) * n]
            if batch.ticket.done_with(piece, batch.frames):
                piece.object.seal(piece.checksums.tolist())
        return batch

    def _header(self, ticket: Ticket, piece: Piece) -> Header:
        g, c = self.ctx.geometry, self.ctx.chunk
        tokens = ticket.tokens[piece.start : piece.start + piece.tokens]
        digest = sha256(tokens.tobytes()).digest() if len(tokens) else UNKNOWN
        return Header(
            key=piece.key, namespace=self.ctx.namespace, parent=piece.parent, token_digest=digest,
            tokens=piece.tokens, grain=c.grain, group=c.group, geometry=g,
            frames=self._plan(piece.tokens, len(piece.links) // LINK), links=piece.links,
        )  # fmt: skip

    def _plan_of(self, tokens: int, links: int) -> tuple[Frame, ...]:
        """Where the frames of a chunk of so many tokens lie: the same for nearly all chunks."""
        raw = [self.ctx.geometry.frame_bytes(n, tokens) for n in self.layers]
        return plan_frames(header_size(len(raw), links), raw, raw)


def _blank_padding(header: Header, lease: Lease) -> None:
    """Zero what lies between frames, so that nobody's old bytes travel with this object."""
    for f in header.frames:
        if f.stored % PAGE:
            lease.view[f.offset + f.stored : f.offset + aligned(f.stored)] = bytes(
                aligned(f.stored) - f.stored
            )
