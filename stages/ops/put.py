"""put: whole objects into a tier.

    warm: {use: put, tier: warm, when_full: drop}

Nothing is put before its last frame is there; what an encoder made is put together here first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.chunks import Chunk, Encoded, EncodedFrame
from tierloom.stages.contract.stage import BatchStage
from tierloom.stages.errors import ArenaFull, Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.ops.in_turns import mark_in_turns


@dataclass(frozen=True, kw_only=True, slots=True)
class PutOptions:
    """Where to."""

    tier: str
    """Name of the tier."""


class Put(BatchStage):
    """Puts each chunk once its last frame is there; skips what the tier has."""

    Options = PutOptions
    takes = "any@any/frame"
    gives = "receipt@host/request"
    tier_options = ("tier",)

    async def apply(self, batch: Batch) -> None:
        name = self.options.tier
        capacity = self.ctx.tiers[name].stat().capacity
        if self.ctx.arriving is not None and batch.encoder is None:
            self._tell(batch, self.ctx.arriving)
        whole: list[Chunk] = []
        objects: list[Object] = []
        for chunk in batch.live:
            if name not in chunk.missing_in or name in chunk.put or not _is_whole(batch, chunk):
                continue
            chunk.put.add(name)  # before the first await: another wave must not put it again
            try:
                made = await self._object(batch, chunk)
            except ArenaFull:
                batch.lose(chunk, Lost.NO_ROOM)
                continue
            upto = made.header.nbytes * (chunk.start + chunk.tokens) / chunk.tokens
            if 0 < capacity < upto:
                batch.lose(chunk, Lost.NO_ROOM)  # it would push out its own prompt's head
                continue
            objects.append(made)
            whole.append(chunk)
        if not objects:
            return
        outcome = await self.ctx.tiers[name].put(objects)
        for chunk, code in zip(whole, outcome, strict=True):
            if code is None:
                chunk.took.add(name)
                batch.request.deliver(name)
            else:
                batch.lose(chunk, code)
        mine = [c for c in batch.request.chunks if name in c.missing_in]
        if all(name in c.put for c in mine):  # that was the last of the request
            await mark_in_turns(
                self.ctx.tiers[name].order_for_eviction, [c.key for c in mine if name in c.took]
            )

    def _tell(self, batch: Batch, arriving: Callable[[Object, range], None]) -> None:
        """Tell of frames that came before the rest of their chunk."""
        name = self.options.tier
        if self.ctx.tiers[name].in_arena:
            for chunk in batch.live:
                obj = chunk.object
                if obj and name in chunk.missing_in and len(batch.frames) < obj.header.groups:
                    arriving(obj, batch.frames)

    async def _object(self, batch: Batch, chunk: Chunk) -> Object:
        """The sealed object that this branch carries; put together first when it was encoded."""
        assert chunk.object is not None
        if batch.encoder is None:
            return chunk.object
        encoded = chunk.encoded[batch.encoder]
        async with encoded.lock:
            if encoded.object is None:
                encoded.object = await self._assemble(batch, chunk, encoded)
        return encoded.object

    async def _assemble(self, batch: Batch, chunk: Chunk, encoded: Encoded) -> Object:
        plain = chunk.object
        assert plain is not None
        frames = [f for f in encoded.frames if f is not None]
        raw, stored = [f.raw for f in frames], [len(f.data) for f in frames]
        header = plain.header.with_frames(raw, stored, encoded.scans)
        named = zip(header.frames, frames, strict=True)
        header = header._replace(frames=tuple(f._replace(codecs=e.codecs) for f, e in named))
        lease = self.ctx.arena.lease(header.nbytes)
        batch.defer(lease.release)
        made = Object(header, lease)
        # A frame that would not shrink is still a view of what it came from.
        await self.ctx.pool(_fill, made, frames, leases=(lease, *chunk.leases()))
        # Their bytes are in the lease now. A branch beside this one may be reading the frames, or
        # come to do so: it finds what it has in hand, or the same bytes here.
        encoded.frames = [
            EncodedFrame(lease.view[f.offset : f.offset + f.stored], f.raw, f.codecs)
            for f in made.header.frames
        ]
        return made


def _is_whole(batch: Batch, chunk: Chunk) -> bool:
    if chunk.object is None or not chunk.object.sealed:
        return False
    if batch.encoder is None:
        return True
    encoded = chunk.encoded.get(batch.encoder)
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
