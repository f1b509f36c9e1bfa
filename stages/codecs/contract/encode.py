"""What every encoding stage shares: frames in, smaller frames out, the chunk's plain object
untouched."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import anyio

from tierloom.stages.codecs.contract.byte_planes import split_planes
from tierloom.stages.codecs.contract.decoding import AESGCM, MOST_CODECS, PLANES, decode_frame
from tierloom.stages.codecs.contract.frame_shape import ELEMENTS, Bytes, FrameShape, Site
from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.chunks import Chunk, Encoded, EncodedFrame
from tierloom.stages.contract.stage import BatchStage, Context

_JOB = 2 << 20
"""Plain bytes of a job: at most some 20 ms of a thread."""


class _FrameJob(NamedTuple):
    """A layer group of a chunk to encode: `past` is what the encoder before made of it."""

    chunk: Chunk
    past: Encoded | None
    mine: Encoded
    group: int


class Encode(BatchStage):
    """Encodes frame by frame; a frame that would not shrink passes as it is."""

    takes = "any@host/frame"
    gives = "bytes@host/frame"
    leases = 1

    scans: int = 1
    """Frames that each frame becomes, from coarse to fine."""

    @abstractmethod
    def squeeze(self, data: Bytes, shape: FrameShape, before: bytes) -> tuple[Bytes, bytes] | None:
        """(encoded bytes, the codec ids that were applied); None: the frame passes as it is.

        `before`: the codecs that `data` went through already; empty: it is the plain frame.
        """

    async def apply(self, batch: Batch) -> None:
        """In many short jobs, which all that somebody waits for goes ahead of."""
        before = batch.encoder
        job: list[_FrameJob] = []
        nbytes = 0
        for chunk in batch.live:
            if chunk.object is None:
                continue
            header = chunk.object.header
            past = None if before is None else chunk.encoded[before]
            scans = past.scans if past else self.scans
            mine = Encoded([None] * (scans * header.groups), scans)
            mine = chunk.encoded.setdefault(self, mine)
            for i in batch.frames:
                job.append(_FrameJob(chunk, past, mine, i))
                nbytes += header.frames[i].raw
                if nbytes >= _JOB:
                    await self._run(job)
                    job, nbytes = [], 0
        if job:
            await self._run(job)
        batch.encoder = self

    async def _run(self, job: list[_FrameJob]) -> None:
        leases = [lease for piece in job for lease in piece.chunk.leases()]
        with anyio.CancelScope(shield=True):  # its memory is promised as long as it is waited for
            await self.ctx.pool(self._encode, job, leases=leases, later=2)

    def _encode(self, job: list[_FrameJob]) -> None:
        for chunk, past, mine, i in job:
            assert chunk.object is not None
            header = chunk.object.header
            shape = FrameShape.of(header, i, chunk.position)
            if past is None:
                f = header.frames[i]
                plain = chunk.object.lease.view[f.offset : f.offset + f.stored]
                source = EncodedFrame(plain, f.raw, b"")
                made = self.parts(source, shape, Site(header, i, b""))
                mine.frames[i :: header.groups] = made
                continue
            for j in range(i, mine.scans * header.groups, header.groups):
                frame = past.frames[j]
                assert frame is not None, "waves reach a branch's stages in order"
                mine.frames[j] = self.frame(frame, shape, Site(header, j, frame.codecs))

    def parts(self, source: EncodedFrame, shape: FrameShape, site: Site) -> list[EncodedFrame]:
        """A plain frame as it goes on: one frame of each scan."""
        return [self.frame(source, shape, site)]

    def frame(self, source: EncodedFrame, shape: FrameShape, site: Site) -> EncodedFrame:
        """One frame as it goes on."""
        full = len(source.codecs) >= MOST_CODECS - 1 or AESGCM in source.codecs
        made = None if full else self.squeeze(source.data, shape, source.codecs)
        if made is None or memoryview(made[0]).nbytes >= memoryview(source.data).nbytes:
            return source
        return EncodedFrame(_plain(made[0]), source.raw, source.codecs + made[1])


class Compiled(Encode):
    """Encodes floats by code that numba compiles."""

    def __init__(self, options: Any, ctx: Context) -> None:
        super().__init__(options, ctx)
        if ctx is not None and ctx.geometry.dtype in ELEMENTS:
            self._warm_up()

    def _warm_up(self) -> None:
        """Compile both ways now: numba would do it in the first request, and hold the GIL."""
        g = self.ctx.geometry
        shape = FrameShape(g.kv, 1, 8, g.heads, g.dim, g.dtype, start=0)
        made = self.squeeze(bytes(shape.nbytes), shape, b"")
        assert made is not None
        decode_frame(made[0], shape, made[1])


class PlanesThen(Encode):
    """A general-purpose compressor, after byte planes where they help."""

    codec: int

    @abstractmethod
    def compress(self, data: Bytes) -> bytes: ...

    def squeeze(self, data: Bytes, shape: FrameShape, before: bytes) -> tuple[Bytes, bytes] | None:
        if self.options.planes and shape.itemsize > 1 and not before:
            return self.compress(split_planes(data, shape.itemsize)), bytes((PLANES, self.codec))
        return self.compress(data), bytes((self.codec,))


def _plain(data: Bytes) -> Bytes:
    return data if isinstance(data, bytes) else data.cast("B")
