"""gather: the engine's cache into frames, checksummed while they are hot.

    pack: {use: gather}

A chunk's frames lie in one lease from the start, after room for its header.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

import numpy as np

from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.contract.request import Request
from tierloom.stages.contract.stage import BatchStage, Context, UnderWay
from tierloom.stages.errors import ArenaFull, Damaged, Lost
from tierloom.stages.kv.object import LINK, Frame, Header, Object, header_size, plan_frames
from tierloom.stages.kv.paged_copy import end_gather
from tierloom.stages.kv.text import pack_text
from tierloom.stages.memory.allocator import PAGE, aligned
from tierloom.stages.memory.arena import Lease
from tierloom.stages.ops import frame_copy
from tierloom.stages.options import NoOptions
from tierloom.stages.tiers.contract.tier import Read
from tierloom.triton_kernels.memory.tables import FrameTable

UNKNOWN = bytes(32)
"""Token digest of a chunk whose caller named it and did not say its tokens."""


class Gather(BatchStage):
    """Copies the chunks of a batch, layer group by layer group, into one lease per chunk."""

    Options = NoOptions
    takes = "plan@host/request"
    gives = "kv@device/frame"
    touches_engine = True
    leases = 1

    def __init__(self, options: NoOptions, ctx: Context) -> None:
        super().__init__(options, ctx)
        g, group = ctx.geometry, ctx.chunk.group
        self.layers = [min(group, g.layers - at) for at in range(0, g.layers, group)]
        self._plan = lru_cache(256)(self._plan_of)

    async def prepare(self, batch: Batch) -> None:
        """Lease memory for whole objects when their first frames come, and read what is kept of
        those that come in part."""
        for chunk in batch.live:
            if chunk.object is not None:
                continue
            header = self._header(batch.request, chunk)
            if chunk.source is not None and not await self._read_head(batch, chunk, header):
                continue
            try:
                lease = self.ctx.arena.lease(header.nbytes)
            except ArenaFull:
                batch.lose(chunk, Lost.NO_ROOM)
                continue
            batch.defer(lease.release)
            _blank_padding(header, lease)
            chunk.object = Object(header, lease)
            chunk.nbytes = sum(f.raw for f in header.frames)
            chunk.checksums = np.zeros(len(self.layers), np.uint64)

    def apply(self, batch: Batch) -> UnderWay | None:
        live = [c for c in batch.live if c.object is not None]
        jobs = [
            (c, o.header, o.lease.at(0, o.header.nbytes), batch.frames, c.tokens)
            for c in live
            if (o := c.object) is not None
        ]
        if not jobs:
            return None
        frames = frame_copy.frame_table(self.ctx.geometry, jobs)
        mark = frame_copy.gather(batch.request.memory, frames, self.ctx.device)
        if mark is None:
            self._gathered(batch, live, frames)
            return None

        def settle() -> None:
            end_gather(frames)
            self._gathered(batch, live, frames)

        return UnderWay([mark], settle)

    def _gathered(self, batch: Batch, live: list[Chunk], frames: FrameTable) -> None:
        """The frames are there, or will not be: seal the chunks of which they are the last."""
        if not frame_copy.is_whole(batch.request.memory, frames):
            for chunk in live:
                batch.lose(chunk, batch.request.cancelled or Lost.CANCELLED)
            return
        part, n, g = (
            slice(batch.frames.start, batch.frames.stop),
            len(batch.frames),
            self.ctx.geometry,
        )
        for i, chunk in enumerate(live):
            assert chunk.checksums is not None
            assert chunk.object is not None
            chunk.checksums[part] = frames.checksum[i * n : (i + 1) * n]
            if chunk.head is not None and not frame_copy.join(
                g, chunk, chunk.head, batch.frames, chunk.wanted
            ):
                batch.refuse(chunk, Damaged("a frame of what is kept does not match its checksum"))
                continue
            if batch.request.done_with(chunk, batch.frames):
                chunk.object.seal(chunk.checksums.tolist())

    async def _read_head(self, batch: Batch, chunk: Chunk, header: Header) -> bool:
        """Read what is kept of a chunk; False: it is lost, as it cannot be had any more."""
        assert chunk.source is not None
        tier, arena = self.ctx.tiers[chunk.source.tiers[0]], self.ctx.arena
        # Nobody was promised memory for it.
        if not tier.in_arena and not batch.reserve(arena, header.nbytes):
            batch.lose(chunk, Lost.NO_ROOM)
            return False
        read = Read(chunk.source.key, len(header.frames))
        try:
            await tier.read([read])
        finally:
            if read.object is not None:
                batch.defer(read.object.lease.release)
        head = read.object
        if (
            read.lost is None
            and head is not None
            and frame_copy.can_join(head.header, header, chunk.wanted)
        ):
            chunk.head = head
        else:
            batch.lose(chunk, read.lost or Lost.BAD_LAYOUT)
        return chunk.head is not None

    def _header(self, request: Request, chunk: Chunk) -> Header:
        g, c = self.ctx.geometry, self.ctx.chunk
        tokens = request.tokens[chunk.start : chunk.start + chunk.tokens]
        digest = sha256(tokens.tobytes()).digest() if len(tokens) else UNKNOWN
        text = pack_text(chunk.text) if chunk.text is not None else b""
        return Header(
            key=chunk.key, namespace=self.ctx.namespace, parent=chunk.parent, token_digest=digest,
            tokens=chunk.tokens, grain=c.grain, group=c.group, geometry=g, links=chunk.links,
            frames=self._plan(chunk.tokens, len(chunk.links) // LINK, len(text)), packed_text=text,
        )  # fmt: skip

    def _plan_of(self, tokens: int, links: int, text: int) -> tuple[Frame, ...]:
        """Where the frames of a chunk of `tokens` tokens lie: the same for nearly all chunks."""
        raw = [self.ctx.geometry.frame_bytes(n, tokens) for n in self.layers]
        return plan_frames(header_size(len(raw), links, text), raw, raw)


def _blank_padding(header: Header, lease: Lease) -> None:
    """Zero what lies between frames, so that nobody's old bytes travel with this object."""
    for f in header.frames:
        if f.stored % PAGE:
            lease.view[f.offset + f.stored : f.offset + aligned(f.stored)] = bytes(
                aligned(f.stored) - f.stored
            )
