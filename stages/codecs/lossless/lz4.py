"""lz4: lossless and light, after byte planes (without them KV hardly shrinks).

    shrink: {use: lz4, planes: true}

Quicker than zstd, and shrinks less.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierloom.stages.codecs.contract.decoding import LZ4
from tierloom.stages.codecs.contract.encode import PlanesThen
from tierloom.stages.codecs.contract.frame_shape import Bytes, FrameShape, Site
from tierloom.stages.errors import BadObject


@dataclass(frozen=True, kw_only=True, slots=True)
class Lz4Options:
    """How to compress."""

    planes: bool = True
    """Split elements into byte planes first."""


class Lz4(PlanesThen):
    """LZ4 block format, by the `lz4` package."""

    Options = Lz4Options
    codec = LZ4

    def compress(self, data: Bytes) -> bytes:
        import lz4.block

        packed: bytes = lz4.block.compress(data, store_size=False)
        return packed


def unlz4(data: Bytes, shape: FrameShape, site: Site | None = None) -> bytes:
    """Inverse of `Lz4.compress`. Raises BadObject."""
    import lz4.block

    try:
        plain: bytes = lz4.block.decompress(data, uncompressed_size=shape.nbytes)
    except (lz4.block.LZ4BlockError, ValueError) as e:
        raise BadObject(f"lz4: {e}") from e
    return plain
