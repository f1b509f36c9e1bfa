"""put: whole objects into a tier.

    warm: {use: put, tier: warm, when_full: drop}

Nothing is put before its last frame is there; what an encoder made is put together here first.
"""

from __future__ import annotations

from dataclasses import dataclass

import xxhash

from tierloom.stages.contract.batch import Batch, Encoded, EncodedFrame, Piece
from tierloom.stages.contract.stage import LoopStage
from tierloom.stages.errors import ArenaFull, Lost
from tierloom.stages.kv.object import LINK, Object, header_size, plan_frames
from tierloom.stages.ops.lookup import in_slices


@dataclass(frozen=True, kw_only=True, slots=True)
class PutOptions:
    """Where to."""

    tier: str
    """Name of the tier."""


class Put(LoopStage):
    """Puts each chunk once its last frame is there; skips what the tier has."""

    Options = PutOptions
    takes = "any@any/frame"
    gives = "receipt@host/request"
    tier_options = ("tier",)

    async def apply_async(self, batch: Batch) -> Batch:
        name = self.options.tier
        capacity = self.ctx.tiers[name].stat().capacity
        whole: list[Piece] = []
        objects: list[Object] = []
        for piece in batch.live:
            if name not in piece.tiers or name in piece.put or not _is_whole(batch, piece):
                continue
            piece.put.add(name)  # before the first await: another wave must not put it again
            try:
                made = await self._object(batch, piece)
            except ArenaFull:
                batch.lose(piece, Lost.NO_ROOM)
                continue
            upto = made.header.nbytes * (piece.start + piece.tokens) / piece.tokens
            if 0 < capacity < upto:
                batch.lose(piece, Lost.NO_ROOM)  # it would push out its own prompt's head
                continue
            objects.append(made)
            whole.append(piece)
        if not objects:
            return batch
        outcome = await self.ctx.tiers[name].put(objects)
        for piece, code in zip(whole, outcome, strict=True):
            if code is None:
                piece.took.add(name)
                batch.ticket.deliver(name)
            else:
                batch.lose(piece, code)
        mine = [p for p in batch.ticket.pieces if name in p.tiers]
        if all(name in p.put for p in mine):  # that was the last of the request
            await in_slices(
                self.ctx.tiers[name].order_for_eviction, [p.key for p in mine if name in p.took]
            )
        return batch

    async def _object(self, batch: Batch, piece: Piece) -> Object:
        """The sealed object that this branch carries; put together first when it was encoded."""
        assert piece.object is not None
        if batch.encoder is None:
            return piece.object
        encoded = piece.encoded[batch.encoder]
        async with encoded.lock:
            if encoded.object is None:
                encoded.object = await self._assemble(batch, piece, encoded)
        return encoded.object

    async def _assemble(self, batch: Batch, piece: Piece, encoded: Encoded) -> Object:
        plain = piece.object
        assert plain is not None
        frames = [f for f in encoded.frames if f is not None]
        size = header_size(len(frames), len(plain.header.links) // LINK)
        header = plain.header._replace(
            scans=encoded.scans,
            frames=tuple(
                f._replace(codecs=e.codecs)
                for f, e in zip(
                    plan_frames(
                        size,
                        [f.raw for f in frames],
                        [len(f.data) for f in frames],
                    ),
                    frames,
                    strict=True,
                )
            ),
        )
        lease = self.ctx.arena.lease(header.nbytes)
        batch.defer(lease.release)
        made = Object(header, lease)
        # A frame that would not shrink is still a view of what it came from.
        await self.ctx.pool(_fill, made, frames, leases=(lease, *piece.leases()))
        # Their bytes are in the lease now. A branch beside this one may be reading the frames, or
        # come to do so: it finds what it has in hand, or the same bytes here.
        encoded.frames = [
            EncodedFrame(lease.view[f.offset : f.offset + f.stored], f.raw, f.codecs)
            for f in made.header.frames
        ]
        return made


def _is_whole(batch: Batch, piece: Piece) -> bool:
    if piece.object is None or not piece.object.sealed:
        return False
    if batch.encoder is None:
        return True
    encoded = piece.encoded.get(batch.encoder)
    return encoded is not None and (encoded.object is not None or encoded.whole)


def _fill(made: Object, frames: list[EncodedFrame]) -> None:
    """Copy encoded frames into their lease, zero what lies between, write the header."""
    view = made.lease.view
    checksums = []
    for at, frame in zip(made.header.frames, frames, strict=True):
        end = at.offset + at.stored
        view[at.offset : end] = frame.data
        pad = -end % 4096
        view[end : end + pad] = bytes(pad)
        checksums.append(xxhash.xxh3_64_intdigest(frame.data))
    made.seal(checksums)
