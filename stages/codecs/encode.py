"""What every encoding stage shares: frames in, smaller frames out, the chunk's plain object
untouched."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from ..base import Lane, Stage
from ..payload import Encoded, EncodedFrame
from .planes import split_planes
from .shape import FrameShape, Site
from .table import AESGCM, MOST_CODECS, PLANES

if TYPE_CHECKING:
    from ..payload import Batch, Piece
    from .shape import Bytes


class Encode(Stage):
    """Encodes frame by frame; a frame that would not shrink passes as it is."""

    takes = "any@host/frame"
    gives = "bytes@host/frame"
    lane = Lane.POOL
    leases = 1

    @abstractmethod
    def squeeze(self, data: Bytes, shape: FrameShape, before: bytes) -> tuple[Bytes, bytes] | None:
        """(encoded bytes, the codec ids that were applied); None: the frame passes as it is.

        `before`: the codecs that `data` went through already; empty: it is the plain frame.
        """

    def apply(self, batch: Batch) -> Batch:
        before = batch.encoder
        for piece in batch.live:
            if piece.object is None:
                continue
            header = piece.object.header
            mine = piece.encoded.setdefault(self, Encoded([None] * len(header.frames)))
            for i in batch.frames:
                source = _source(piece, before, i)
                shape = FrameShape.of(header, i, piece.position)
                mine.frames[i] = self.frame(source, shape, Site(header, i, source.codecs))
        batch.encoder = self
        return batch

    def frame(self, source: EncodedFrame, shape: FrameShape, site: Site) -> EncodedFrame:
        """One frame as it goes on."""
        full = len(source.codecs) >= MOST_CODECS - 1 or AESGCM in source.codecs
        made = None if full else self.squeeze(source.data, shape, source.codecs)
        if made is None or memoryview(made[0]).nbytes >= memoryview(source.data).nbytes:
            return source
        return EncodedFrame(_plain(made[0]), source.raw, source.codecs + made[1])


class PlanesThen(Encode):
    """A general-purpose compressor, behind byte planes where they help."""

    codec: int

    @abstractmethod
    def compress(self, data: Bytes) -> bytes: ...

    def squeeze(self, data: Bytes, shape: FrameShape, before: bytes) -> tuple[Bytes, bytes] | None:
        if self.options.planes and shape.itemsize > 1 and not before:
            return self.compress(split_planes(data, shape.itemsize)), bytes((PLANES, self.codec))
        return self.compress(data), bytes((self.codec,))


def _plain(data: Bytes) -> Bytes:
    return data if isinstance(data, bytes) else data.cast("B")


def _source(piece: Piece, encoder: object | None, i: int) -> EncodedFrame:
    """Frame i as the stage before left it."""
    if encoder is not None:
        frame = piece.encoded[encoder].frames[i]
        assert frame is not None, "waves reach a branch's stages in order"
        return frame
    assert piece.object is not None
    f = piece.object.header.frames[i]
    return EncodedFrame(piece.object.lease.view[f.offset : f.offset + f.stored], f.raw, b"")
