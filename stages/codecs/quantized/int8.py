"""int8: eight bits an element, symmetric, one float16 scale per token and head.

    small: {use: int8, from: host}

Lossy, though little is lost: half of bfloat16's bytes at a thousandth of the noise that a sampler
adds. An element is off by at most half its scale, which is its head's greatest magnitude / 127.
"""

from __future__ import annotations

from struct import Struct

import numpy as np

from tierloom.stages.codecs.contract.decoding import INT8
from tierloom.stages.codecs.contract.frame_shape import Bytes, FrameShape, Part, Site, fresh, parted
from tierloom.stages.codecs.contract.lossy import Array, Lossy, as_bytes, blank, head_of
from tierloom.stages.options import NoOptions
from tierloom.triton_kernels.quantize.cpu import int8_decode, int8_encode

_HEAD = Struct("<Bx")


class Int8(Lossy):
    """A version, scales float16 [planes, tokens, heads], codes int8 [planes, tokens, heads,
    dim]."""

    Options = NoOptions
    codec = INT8

    def quantize(self, x: Array, shape: FrameShape) -> memoryview | None:
        made, (scales, codes) = fresh(_HEAD.pack(1), _parts(shape))
        return made if int8_encode(x.reshape(codes.shape), scales, codes) else None


def from_int8(data: Bytes, shape: FrameShape, site: Site | None = None) -> Bytes:
    """Inverse of `Int8.quantize`. Raises BadObject."""
    head_of(data, _HEAD, shape)
    scales, codes = parted(data, _HEAD.size, _parts(shape))
    x = blank(shape)
    int8_decode(codes, scales, x.reshape(codes.shape))
    return as_bytes(x)


def _parts(shape: FrameShape) -> tuple[Part, ...]:
    vectors = shape.planes * shape.tokens * shape.heads
    return (np.int16, (vectors,)), (np.int8, (vectors, shape.dim))
