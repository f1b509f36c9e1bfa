"""int4: four bits an element in groups of 32 channels, K without its channel means.

    small: {use: int4, from: host}

Lossy: 4.5 bits an element. K has channels that are far from zero for all tokens; without their
means its groups are narrower (KIVI, arXiv 2402.02750, quantizes K per channel for the same reason).
The first tokens of a sequence draw most attention and lie far out: they are kept as they are.
Groups are asymmetric: a float16 scale has no use for its sign and its last four bits, and the zero
point has. An element is off by at most half its scale, which is its group's range / 15.25.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

import numpy as np

from tierloom.stages.codecs.contract.decoding import INT4
from tierloom.stages.codecs.contract.frame_shape import (
    ELEMENTS,
    Bytes,
    FrameShape,
    Part,
    Site,
    fresh,
    parted,
)
from tierloom.stages.codecs.contract.lossy import Array, Lossy, as_bytes, blank, head_of
from tierloom.stages.errors import BadObject
from tierloom.triton_kernels.quantize.cpu import GROUP, channel_means, int4_decode, int4_encode

_HEAD = Struct("<BxH")


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4Options:
    """What is spared."""

    first: int = 4
    """Tokens at the start of a sequence that are kept as they are."""

    def __post_init__(self) -> None:
        if not 0 <= self.first <= 65535:
            raise ValueError(f"first must lie in 0..65535, got {self.first}")


class Int4(Lossy):
    """A version and how many tokens are spared; float16 means of K's channels; steps uint16 (11
    bits of scale, 5 of zero point); the spared tokens; codes, two in a byte."""

    Options = Int4Options
    codec = INT4

    def quantize(self, x: Array, shape: FrameShape) -> memoryview | None:
        first = 0
        if 0 <= shape.start < self.options.first:
            first = min(self.options.first - shape.start, shape.tokens)
        made, (means, steps, spared, codes) = fresh(_HEAD.pack(1, first), _parts(shape, first))
        rows = x.reshape(shape.planes, shape.tokens, shape.channels)
        spared[:] = rows[:, :first]
        if not channel_means(rows, first, means):
            return None
        return made if int4_encode(rows, first, means, steps, codes) else None


def from_int4(data: Bytes, shape: FrameShape, site: Site | None = None) -> Bytes:
    """Inverse of `Int4.quantize`. Raises BadObject."""
    _, first = head_of(data, _HEAD, shape)
    if first > shape.tokens:
        raise BadObject(f"int4: {first} tokens spared of {shape.tokens}")
    means, steps, spared, codes = parted(data, _HEAD.size, _parts(shape, first))
    x = blank(shape)
    rows = x.reshape(shape.planes, shape.tokens, shape.channels)
    rows[:, :first] = spared
    int4_decode(codes, first, means, steps, rows)
    return as_bytes(x)


def _parts(shape: FrameShape, first: int) -> tuple[Part, ...]:
    planes, channels, left = shape.planes, shape.channels, shape.tokens - first
    groups = -(-channels // GROUP)
    return (
        (np.int16, (shape.layers, channels)),  # K's planes are the first `layers`
        (np.uint16, (planes, left, groups)),
        (ELEMENTS[shape.dtype], (planes, first, channels)),
        (np.uint8, (planes, left, groups, GROUP // 2)),
    )
