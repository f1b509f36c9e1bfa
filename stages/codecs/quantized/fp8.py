"""fp8: e4m3fn, eight bits an element, one scale per head and group of tokens.

    small: {use: fp8, from: host, group: 64}

Lossy. Three bits of mantissa, whatever the magnitude: what is small in its group keeps them, where
int8 would round it away. With its scale nothing saturates, as a bare cast to fp8 does from 448 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

import numpy as np

from tierloom.stages.codecs.contract.decoding import FP8
from tierloom.stages.codecs.contract.frame_shape import Bytes, FrameShape, Part, Site, fresh, parted
from tierloom.stages.codecs.contract.lossy import Array, Lossy, as_bytes, blank, head_of
from tierloom.stages.errors import BadObject
from tierloom.triton_kernels.quantize.cpu import fp8_decode, fp8_encode

_HEAD = Struct("<BxH")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Options:
    """How many share a scale."""

    group: int = 64
    """Tokens that share one scale, head by head."""

    def __post_init__(self) -> None:
        if not 1 <= self.group <= 65535:
            raise ValueError(f"group must lie in 1..65535, got {self.group}")


class Fp8(Lossy):
    """A version and the group, scales float32 [planes, groups, heads], codes uint8 [planes,
    tokens, heads, dim]."""

    Options = Fp8Options
    codec = FP8

    def quantize(self, x: Array, shape: FrameShape) -> memoryview | None:
        group = self.options.group
        made, (scales, codes) = fresh(_HEAD.pack(1, group), _parts(shape, group))
        return made if fp8_encode(x, group, scales, codes) else None


def from_fp8(data: Bytes, shape: FrameShape, site: Site | None = None) -> Bytes:
    """Inverse of `Fp8.quantize`. Raises BadObject."""
    _, group = head_of(data, _HEAD, shape)
    if not group:
        raise BadObject("fp8: groups of no tokens")
    scales, codes = parted(data, _HEAD.size, _parts(shape, group))
    x = blank(shape)
    fp8_decode(codes, group, scales, x)
    return as_bytes(x)


def _parts(shape: FrameShape, group: int) -> tuple[Part, ...]:
    planes, groups = shape.planes, -(-shape.tokens // group)
    return (
        (np.float32, (planes, groups, shape.heads)),
        (np.uint8, (planes, shape.tokens, shape.heads, shape.dim)),
    )
