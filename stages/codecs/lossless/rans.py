"""rans: lossless, what floats have in common entropy-coded, the noise of their mantissas raw.

    small: {use: rans, from: host}

Lossless, whatever the bits: NaN, infinities, denormals and -0.0 among them. Sign, exponent and the
mantissa's first bit (two of float16) are one symbol; channels with like symbols share one of a few
frequency tables, made of this very frame and stored in it, so nothing needs calibration. bfloat16
of a language model takes about 10.4 bits an element, where byte planes and zstd take 11.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tierloom.stages.codecs.contract.decoding import RANS
from tierloom.stages.codecs.contract.encode import Compiled
from tierloom.stages.codecs.contract.frame_shape import (
    Bytes,
    FrameShape,
    Part,
    Site,
    fresh,
    parted,
    read_only,
)
from tierloom.stages.codecs.lossless.rans_side import (
    LEVEL_BITS,
    alphabet,
    columns_of,
    freq_of,
    levels_of,
    packed_bits,
    room_for,
    unpacked_bits,
)
from tierloom.stages.errors import BadObject
from tierloom.stages.options import NoOptions
from tierloom.triton_kernels.exponent.cpu import count_tops, merge, rest_bytes, split
from tierloom.triton_kernels.rans.clusters_cpu import cluster, count_columns
from tierloom.triton_kernels.rans.cpu import decode_streams, encode_streams
from tierloom.triton_kernels.rans.format import DONE, StreamGrid
from tierloom.triton_kernels.rans.tables import BITS, RansTables

_HEAD = Struct("<BBBBIIII")
_SHIFT = {"bfloat16": 6, "float16": 8, "float32": 6}
_BITS = 12
_TURNS = 5
_PER_TABLE = 12288
"""Elements that are worth a table: its bytes, and what it costs to choose among more."""
_MOST_TABLES = 64
_MOST_ESCAPES = 64
"""One escape in this many elements at most: a frame with more does not shrink."""


class _StreamSizes(NamedTuple):
    """What a frame begins with, after its version: bits of the frequencies; all else follows."""

    bits: int
    tables: int
    """K."""
    symbols: int
    """NS, with the one that marks escapes."""
    columns: int
    """Into which a plane's elements are cut; it has elements / columns rows."""
    escapes: int
    """Elements whose top has no symbol."""
    present: int
    """Frequencies that are not 0, in all tables."""
    words: int


class Rans(Compiled):
    """A version and sizes, then: counts u32 and states u32 of the streams (`rans_format`); escapes
    u32 (which elements), u16 (their tops); of float32 the low halves u16; words u16; the rest u8
    (`exponent_cpu`); packed, each column's table; which tops have symbols; of each table, which
    symbols it has, and their levels in 6 bits (`rans_side`)."""

    Options = NoOptions

    def squeeze(self, data: Bytes, shape: FrameShape, before: bytes) -> tuple[Bytes, bytes] | None:
        if before or shape.dtype not in _SHIFT or not shape.nbytes:
            return None
        made = _encode(data, shape)
        return None if made is None else (made, bytes((RANS,)))


def _encode(data: Bytes, shape: FrameShape) -> memoryview | None:
    x, low = _halves(data, shape.dtype)
    shift = _SHIFT[shape.dtype]
    counts = np.zeros(_tops(shape.dtype), np.int64)
    count_tops(x, shift, counts)
    known = counts > 0
    if known.sum() > 256:
        known = np.zeros_like(known)
        known[np.argsort(-counts, kind="stable")[:255]] = True
    escapes = len(x) - int(counts[known].sum())
    if escapes > len(x) // _MOST_ESCAPES:
        return None
    tops = alphabet(known)
    symbol_of = np.full(len(counts), 255, np.uint8)
    symbol_of[tops] = np.arange(len(tops))
    symbols, rest = np.empty(len(x), np.uint8), np.empty(rest_bytes(len(x), shift), np.uint8)
    split(x, shift, symbol_of, symbols, rest)
    out = np.flatnonzero(symbols == 255) if escapes else np.empty(0, np.int64)

    each = shape.tokens * shape.channels
    columns = columns_of(symbols[:each], shape.tokens, shape.channels)
    streams = StreamGrid.of(shape.planes, each // columns, columns)
    tables = np.empty((_most_tables(len(x), _PER_TABLE), len(tops) + (escapes > 0)), np.int64)
    choice = np.empty(shape.planes * columns, np.uint8)
    cells = symbols.reshape(shape.planes, -1, columns)
    found = np.zeros((shape.planes, columns, tables.shape[1]), np.uint32)
    count_columns(cells, found)
    cluster(found.reshape(len(choice), -1), _TURNS, choice, tables)
    present, levels = tables > 0, levels_of(tables)
    coder = RansTables.of(freq_of(present, levels, _BITS), _BITS)
    by_plane = choice.reshape(shape.planes, columns)
    room = np.empty(streams.most_words(_BITS), np.uint16)
    status = np.empty((streams.planes, streams.groups), np.uint8)
    ends = np.empty(status.shape, np.uint32), np.empty((*status.shape, streams.lanes), np.uint32)
    words = encode_streams(streams, coder, cells, by_plane, room, *ends, status)
    assert (status == DONE).all(), "every symbol that was counted has a frequency"

    sizes = _StreamSizes(_BITS, *tables.shape, columns, escapes, len(levels), words)
    head = _HEAD.pack(1, _BITS, sizes.tables - 1, sizes.symbols - 1, *sizes[3:])
    made, parts = fresh(head, _parts(shape, streams, sizes))
    kept = (
        *ends, out.astype(np.uint32), x[out] >> np.uint16(shift), low, room[:words], rest,
        packed_bits(choice, _choice_bits(sizes.tables)), packed_bits(known, 1),
        packed_bits(present, 1), packed_bits(levels, LEVEL_BITS),
    )  # fmt: skip
    for part, value in zip(parts, kept, strict=True):
        part[...] = value
    return made


def from_rans(data: Bytes, shape: FrameShape, site: Site | None = None) -> Bytes:
    """Inverse of `Rans.squeeze`. Raises BadObject."""
    if shape.dtype not in _SHIFT or not shape.nbytes:
        raise BadObject(f"rans, but {shape}")
    sizes, streams = _read_head(data, shape)
    parts = parted(data, _HEAD.size, _parts(shape, streams, sizes))
    counts, states, out, out_tops, low, words, rest, choices, known, present, levels = parts

    tops = alphabet(unpacked_bits(known, _tops(shape.dtype), 1).astype(bool))
    has = unpacked_bits(present, sizes.tables * sizes.symbols, 1).astype(bool)
    if len(tops) + (sizes.escapes > 0) != sizes.symbols or has.sum() != sizes.present:
        raise BadObject("rans: symbols that were not announced")
    try:
        freq = freq_of(
            has.reshape(sizes.tables, -1),
            unpacked_bits(levels, sizes.present, LEVEL_BITS),
            sizes.bits,
        )
        coder = RansTables.of(freq, sizes.bits)
    except ValueError as e:
        raise BadObject(f"rans: {e}") from e
    choice = unpacked_bits(choices, streams.planes * streams.channels, _choice_bits(sizes.tables))
    symbols = np.empty((streams.planes, streams.tokens, streams.channels), np.uint8)
    status = np.empty(counts.shape, np.uint8)
    by_plane = choice.reshape(streams.planes, -1)
    decode_streams(streams, coder, words, counts, states, by_plane, symbols, status)
    if (status != DONE).any():
        raise BadObject("rans: a stream that does not end where it should")

    shift = _SHIFT[shape.dtype]
    top_of = np.zeros(256, np.uint16)
    top_of[: len(tops)] = tops
    x = np.empty(symbols.size, np.uint16)
    merge(symbols.reshape(-1), rest, shift, top_of, x)
    if sizes.escapes:
        if out.max() >= x.size:
            raise BadObject("rans: an escape beyond the frame")
        x[out] = (x[out] & ((1 << shift) - 1)) | (out_tops << np.uint16(shift))
    whole = x if shape.dtype != "float32" else (x.astype(np.uint32) << 16) | low
    return whole.view(np.uint8).data


def _read_head(data: Bytes, shape: FrameShape) -> tuple[_StreamSizes, StreamGrid]:
    """Sizes that no frame of this shape has are refused before any memory is taken for them."""
    if memoryview(data).nbytes < _HEAD.size:
        raise BadObject(f"cut short: {memoryview(data).nbytes} bytes")
    version, *fields = _HEAD.unpack_from(data)
    if version != 1:
        raise BadObject(f"version {version} of a codec is unknown to this tierloom")
    sizes = _StreamSizes(*fields)
    sizes = sizes._replace(tables=sizes.tables + 1, symbols=sizes.symbols + 1)
    each = shape.tokens * shape.channels
    if (
        sizes.bits not in BITS
        or sizes.tables > _most_tables(shape.planes * each, _PER_TABLE // 2)
        or not sizes.columns
        or each % sizes.columns
        or sizes.escapes > shape.planes * each // _MOST_ESCAPES
        or sizes.present > sizes.tables * sizes.symbols
    ):
        raise BadObject(f"rans: no frame of {shape} has {sizes}")
    try:
        return sizes, StreamGrid.of(shape.planes, each // sizes.columns, sizes.columns)
    except ValueError as e:
        raise BadObject(f"rans: {e}") from e


def _parts(shape: FrameShape, streams: StreamGrid, sizes: _StreamSizes) -> tuple[Part, ...]:
    n = shape.planes * shape.tokens * shape.channels
    chosen = streams.planes * streams.channels
    return (
        (np.uint32, (streams.planes, streams.groups)),
        (np.uint32, (streams.planes, streams.groups, streams.lanes)),
        (np.uint32, (sizes.escapes,)),
        (np.uint16, (sizes.escapes,)),
        (np.uint16, (n if shape.dtype == "float32" else 0,)),
        (np.uint16, (sizes.words,)),
        (np.uint8, (rest_bytes(n, _SHIFT[shape.dtype]),)),
        (np.uint8, (room_for(chosen, _choice_bits(sizes.tables)),)),
        (np.uint8, (room_for(_tops(shape.dtype), 1),)),
        (np.uint8, (room_for(sizes.tables * sizes.symbols, 1),)),
        (np.uint8, (room_for(sizes.present, LEVEL_BITS),)),
    )


def _halves(data: Bytes, dtype: str) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """The elements, or float32's high halves, as a bfloat16 would have them, and its low ones."""
    if dtype != "float32":
        return read_only(np.frombuffer(data, np.uint16)), np.empty(0, np.uint16)
    whole = np.frombuffer(data, np.uint32)
    return read_only((whole >> np.uint32(16)).astype(np.uint16)), whole.astype(np.uint16)


def _tops(dtype: str) -> int:
    """How many tops there can be."""
    return 1 << (16 - _SHIFT[dtype])


def _choice_bits(tables: int) -> int:
    return (tables - 1).bit_length()


def _most_tables(elements: int, per_table: int) -> int:
    return min(_MOST_TABLES, max(1, elements // per_table))
