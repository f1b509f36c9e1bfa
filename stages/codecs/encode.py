"""What every encoding stage shares: frames in, smaller frames out, the chunk's plain object
untouched."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from ..base import Lane, Stage
from ..payload import Encoded, EncodedFrame
from .table import PLANES, split_planes

if TYPE_CHECKING:
    from ..payload import Batch, Piece
    from .table import Bytes


class Encode(Stage):
    """Encodes frame by frame; a frame that would not shrink passes as it is."""

    takes = "any@host/frame"
    gives = "bytes@host/frame"
    lane = Lane.POOL
    leases = 1

    @abstractmethod
    def squeeze(self, data: Bytes, itemsize: int) -> tuple[bytes, bytes]:
        """(encoded bytes, the codec ids that were applied)."""

    def apply(self, batch: Batch) -> Batch:
        before = batch.encoder
        for piece in batch.live:
            if piece.object is None:
                continue
            mine = piece.encoded.setdefault(self, Encoded([None] * len(piece.object.header.frames)))
            for i in batch.frames:
                mine.frames[i] = self._frame(_source(piece, before, i))
        batch.encoder = self
        return batch

    def _frame(self, source: EncodedFrame) -> EncodedFrame:
        data, codecs = self.squeeze(source.data, self.ctx.geometry.itemsize)
        if len(data) >= len(source.data):
            return source
        return EncodedFrame(data, source.raw, source.codecs + codecs)


class PlanesThen(Encode):
    """A general-purpose compressor, behind byte planes where they help."""

    codec: int

    @abstractmethod
    def compress(self, data: Bytes) -> bytes: ...

    def squeeze(self, data: Bytes, itemsize: int) -> tuple[bytes, bytes]:
        if self.options.planes and itemsize > 1 and memoryview(data).nbytes % itemsize == 0:
            return self.compress(split_planes(data, itemsize)), bytes((PLANES, self.codec))
        return self.compress(data), bytes((self.codec,))


def _source(piece: Piece, encoder: object | None, i: int) -> EncodedFrame:
    """Frame i as the stage before left it."""
    if encoder is not None:
        frame = piece.encoded[encoder].frames[i]
        assert frame is not None, "waves reach a branch's stages in order"
        return frame
    assert piece.object is not None
    f = piece.object.header.frames[i]
    return EncodedFrame(piece.object.lease.view[f.offset : f.offset + f.stored], f.raw, b"")
