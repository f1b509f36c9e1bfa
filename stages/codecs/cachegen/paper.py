"""The levels `paper-1` to `paper-3` of `cachegen`: CacheGen's own quantizer, to compare with.

As the code released with CacheGen has it (Liu et al., arXiv 2310.07240): K as it is kept, turned,
and no means; per layer and token one scale, the largest number of all its heads; more bins for the
first layers, cut at layers 10, 20 and 2 of 32, and in that share of other depths. What differs is
how the symbols are coded: by this codec's tables, not by a table per channel in each chunk.

Head; what `coded_parts` has; the largest number of each plane, uint8 [planes]; each token's scale,
an element [planes, tokens]; centers int8 [planes, channels], around which a channel's numbers lie
as the tables want it; tables' numbers uint8 [planes, channels].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tierloom.stages.codecs.cachegen.codebook import standard
from tierloom.stages.codecs.cachegen.coder import CodedArrays, CodedHead, coded, framed, grid_of
from tierloom.stages.codecs.contract.frame_shape import ELEMENTS, Bytes, FrameShape, Part
from tierloom.stages.codecs.contract.lossy import Array, as_bytes, blank
from tierloom.stages.errors import BadObject
from tierloom.triton_kernels.cachegen import cpu

BINS = {
    "paper-3": (((32, 32),), ((32, 32),)),
    "paper-2": (((10, 32), (32, 16)), ((2, 32), (32, 16))),
    "paper-1": (((20, 16), (32, 12)), ((2, 16), (32, 12))),
}
"""Of each level, for K and then V: (up to this layer of 32, bins)."""


def most_of(level: str, shape: FrameShape, first: int, depth: int) -> npt.NDArray[np.int32]:
    """The largest number of each plane, whose first layer is `first` of the model's `depth`."""
    layers = range(first, first + shape.layers)
    cuts = BINS[level][: shape.kv]  # a latent is coded as K is
    bins = [next(b for upto, b in cut if 32 * i < upto * depth) for cut in cuts for i in layers]
    return np.array(bins, np.int32) // 2 - 1


def encoded(rows: Array, head: CodedHead, shape: FrameShape, most: Array) -> memoryview | None:
    """The bytes of a frame of element bits [planes, tokens, channels]; None where a number is not
    finite, or nothing is there to code."""
    grid = grid_of(shape, 0)
    if grid is None:
        return None
    q = np.empty(rows.shape, np.int16)
    tops = np.empty(rows.shape[:2], rows.dtype)
    if not cpu.quantize_tokens(rows, most, tops, q):
        return None
    centers = np.rint(q.mean(axis=1)).astype(np.int8)
    q -= centers[:, None]
    tabid = np.empty(centers.shape, np.uint8)
    cpu.choose_tables(q, standard().costs, tabid)
    parts = coded(q, standard(), tabid, grid, rows[:, :0])
    return framed(head, shape, grid, parts, (most, tops, centers, tabid), _own_parts(shape))


def decoded_paper(data: Bytes, head: CodedHead, shape: FrameShape) -> Bytes:
    """Inverse of `encoded`. Raises BadObject."""
    grid = grid_of(shape, 0)
    if grid is None or head.first or head.half or head.calibration:
        raise BadObject(f"cachegen: {head} in {shape}")
    read = CodedArrays(data, head, shape, grid, _own_parts(shape))
    most, tops, centers, tabid = read.own
    if not most.all():
        raise BadObject("cachegen: a plane of no numbers")
    symbols = read.symbols(standard(), tabid)
    x = blank(shape)
    rows = x.reshape(shape.planes, shape.tokens, shape.channels)
    scales, escapes = (most.astype(np.int32), tops), (read.places, read.values)
    used = cpu.dequantize_tokens(symbols, centers, *scales, *escapes, rows)
    if used != len(read.places):
        raise BadObject("cachegen: escapes out of place, or a scale that is not a number")
    return as_bytes(x)


def _own_parts(shape: FrameShape) -> tuple[Part, ...]:
    return (
        (np.uint8, (shape.planes,)),
        (ELEMENTS[shape.dtype], (shape.planes, shape.tokens)),
        (np.int8, (shape.planes, shape.channels)),
        (np.uint8, (shape.planes, shape.channels)),
    )
