"""zstd: lossless, after byte planes.

    shrink: {use: zstd, level: 3, planes: true}

Lossless. Without planes the exponents hide among the mantissas, and little shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierloom.stages.codecs.contract.decoding import ZSTD
from tierloom.stages.codecs.contract.encode import PlanesThen
from tierloom.stages.codecs.contract.frame_shape import Bytes, FrameShape, Site
from tierloom.stages.errors import BadObject


@dataclass(frozen=True, kw_only=True, slots=True)
class ZstdOptions:
    """How hard to try."""

    level: int = 1
    """1 (fast) to 19 (small). KV gains little above 3."""
    planes: bool = True
    """Split elements into byte planes first."""

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 19:
            raise ValueError(f"level must lie in 1..19, got {self.level}")


class Zstd(PlanesThen):
    """RFC 8878, by the `zstandard` package."""

    Options = ZstdOptions
    codec = ZSTD

    def compress(self, data: Bytes) -> bytes:
        import zstandard

        return zstandard.ZstdCompressor(level=self.options.level).compress(data)


def unzstd(data: Bytes, shape: FrameShape, site: Site | None = None) -> bytes:
    """Inverse of `Zstd.compress`. Raises BadObject. What the bytes claim to become is believed only
    where it fits the frame: room for it is taken before they are read."""
    import zstandard

    try:
        claimed = zstandard.get_frame_parameters(data).content_size
        if claimed > shape.nbytes:  # not said: the largest number there is
            raise BadObject(f"zstd: {claimed} bytes claimed, expected at most {shape.nbytes}")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise BadObject(f"zstd: {e}") from e
