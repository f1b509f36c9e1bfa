"""What every frame of `cachegen` has: a head, and symbols in streams of interleaved rANS.

Numbers around zero become symbols (`cachegen_cpu.py`); each plane's channel names one of the tables
of a codebook. What is further off than its table reaches escapes to a list.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tierloom.stages.codecs.cachegen.codebook import BITS, Codebook
from tierloom.stages.codecs.contract.frame_shape import (
    ELEMENTS,
    Bytes,
    FrameShape,
    Part,
    fresh,
    parted,
    sized,
)
from tierloom.stages.codecs.contract.lossy import Array
from tierloom.stages.errors import BadObject
from tierloom.triton_kernels.cachegen import cpu
from tierloom.triton_kernels.rans.cpu import decode_streams, encode_streams
from tierloom.triton_kernels.rans.format import DONE, StreamGrid

Tables = npt.NDArray[np.uint8]

HEAD = Struct("<BBBxHHHxxIIIQ")
FIRST = 4
"""Tokens at the start of a sequence that are kept as they are."""


class CodedHead(NamedTuple):
    """What a frame begins with."""

    version: int
    level: int
    first: int
    """Tokens that are kept as they are."""
    half: int
    """Pairs of channels of a head that are turned back; 0: K is kept as it is turned."""
    layer: int
    """The frame's first layer and KV head, as the whole model counts them."""
    kv_head: int
    start: int
    """The position of the first token, where K is turned back."""
    escapes: int
    words: int
    calibration: int
    """0: means, steps and tables' numbers are in the frame."""


def spared(shape: FrameShape) -> int:
    """How many tokens of a frame are kept as they are."""
    return min(max(FIRST - shape.start, 0), shape.tokens) if shape.start >= 0 else 0


def grid_of(shape: FrameShape, first: int) -> StreamGrid | None:
    """The streams of all tokens but the `first`. None where nothing is left to code, or more than
    the coder counts."""
    left = shape.tokens - first
    if left < 1 or shape.planes * left * shape.channels >= 1 << 32:
        return None
    try:
        return StreamGrid.of(shape.planes, left, shape.channels)
    except ValueError:
        return None


def coded_parts(shape: FrameShape, head: CodedHead, grid: StreamGrid) -> tuple[Part, ...]:
    """The arrays that follow every head: states and counts of the streams, places and values of the
    escapes, the first tokens, the streams' words."""
    planes = shape.planes
    return (
        (np.uint32, (planes, grid.groups, grid.lanes)),
        (np.uint32, (planes, grid.groups)),
        (np.uint32, (head.escapes,)),
        (np.int32, (head.escapes,)),
        (ELEMENTS[shape.dtype], (planes, head.first, shape.channels)),
        (np.uint16, (head.words,)),
    )


def coded(
    q: Array, book: Codebook, tabid: Tables, grid: StreamGrid, first: Array
) -> tuple[Array, ...]:
    """Numbers q int16 [planes, tokens, channels] as the arrays of `coded_parts`; `first` are the
    tokens that stand before them."""
    symbols, places, values = to_symbols(q, book, tabid)
    lanes = (grid.planes, grid.groups, grid.lanes)
    counts, status = np.empty(lanes[:2], np.uint32), np.empty(lanes[:2], np.uint8)
    states, words = np.empty(lanes, np.uint32), np.empty(grid.most_words(BITS), np.uint16)
    found = encode_streams(grid, book.tables, symbols, tabid, words, counts, states, status)
    assert (status == DONE).all(), "every symbol within reach has a frequency"
    return states, counts, places, values, first, words[:found]


def framed(
    head: CodedHead, shape: FrameShape, grid: StreamGrid, parts: tuple[Array, ...],
    own: tuple[Array, ...], own_parts: tuple[Part, ...],
) -> memoryview:  # fmt: skip
    """A frame's bytes: its head, `parts` as `coded` leaves them, and arrays of its own, if any."""
    head = head._replace(escapes=len(parts[2]), words=len(parts[5]))
    layout = coded_parts(shape, head, grid) + (own_parts if own else ())
    made, arrays = fresh(HEAD.pack(*head), layout)
    for array, part in zip(arrays, (*parts, *own), strict=True):
        array[...] = part
    return made


class CodedArrays:
    """What follows a frame's head, as it was read; copies, since compiled code knows its arrays as
    writable ones."""

    def __init__(
        self, data: Bytes, head: CodedHead, shape: FrameShape, grid: StreamGrid,
        own_parts: tuple[Part, ...], *, goes_on: bool = False,
    ) -> None:  # fmt: skip
        """`goes_on`: there may be more of `data` after them. Raises BadObject."""
        parts = coded_parts(shape, head, grid) + own_parts
        self.nbytes = HEAD.size + sized(parts)
        read = parted(data[: self.nbytes] if goes_on else data, HEAD.size, parts)
        copies = [array.copy() for array in read]
        states, counts, self.places, self.values, self.spared, words, *own = copies
        self.own, self._grid, self._streams = own, grid, (words, counts, states)

    def symbols(self, book: Codebook, tabid: Tables) -> Tables:
        """The symbols uint8 [planes, tokens, channels]. Raises BadObject."""
        grid = self._grid
        symbols = np.empty((grid.planes, grid.tokens, grid.channels), np.uint8)
        status = np.empty((grid.planes, grid.groups), np.uint8)
        decode_streams(grid, book.tables, *self._streams, tabid, symbols, status)
        if (status != DONE).any():
            raise BadObject("cachegen: a stream does not end where it should")
        return symbols


def to_symbols(q: Array, book: Codebook, tabid: Tables) -> tuple[Array, Array, Array]:
    """Symbols like q, and the escapes: places uint32 and values int32."""
    symbols = np.empty(q.shape, np.uint8)
    room = q.size // 256
    while True:
        places, values = np.empty(room, np.uint32), np.empty(room, np.int32)
        found = cpu.to_symbols(q, book.reach, tabid, symbols, places, values)
        if found <= room:
            return symbols, places[:found], values[:found]
        room = found
