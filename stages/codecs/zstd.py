"""zstd: lossless, behind byte planes.

    shrink: {use: zstd, level: 3, planes: true}

Lossless. Without planes the exponents hide among the mantissas, and little shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .encode import PlanesThen
from .table import ZSTD

if TYPE_CHECKING:
    from .table import Bytes


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
