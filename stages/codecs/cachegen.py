"""cachegen: entropy-coded numbers, whose steps are as fine as the level wants: 2.4 to 4.8 bits.

    small: {use: cachegen, from: host, level: default}

Lossy. After CacheGen (Liu et al., arXiv 2310.07240), with three changes that a real model asked
for: K's rotary position embedding is undone, each channel's mean is subtracted (in place of deltas
to anchor tokens), and probabilities are not kept per chunk: a channel names one of 64 tables. Then
what remains is rounded to steps and coded by interleaved rANS (`rans_format.py`). The first tokens
of a sequence, which draw most attention and lie far out, are kept as they are.

Means and tables' names are in the frame: any config reads it, and no file is needed to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ...triton_kernels import cachegen_cpu as cpu
from ...triton_kernels.rans_cpu import decode_streams, encode_streams
from ...triton_kernels.rans_format import DONE, StreamGrid
from ..errors import BadObject
from .cachegen_tables import BITS, Codebook, standard
from .lossy import Lossy, as_bytes, blank, head_of
from .rope import NONE, frequencies
from .shape import ELEMENTS, fresh, parted
from .table import CACHEGEN

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..base import Context
    from .lossy import Array
    from .shape import Bytes, FrameShape, Part, Site

    Turns = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]

FIRST = 4
"""Tokens at the start of a sequence that are kept as they are."""
LEVELS = {"high": (1, 0.15, 0.15), "default": (2, 0.42, 0.42), "small": (3, 0.85, 0.85)}
"""A level's number in frames, and its steps of K and of V, as shares of a plane's deviation. Found
on texts to calibrate by; with other shares of K to V the same bits cost more."""
_LEAST = 1e-30
"""Deviations below it are of planes that stand still: the inverse of a step would not be finite."""
_MOST = 2e36
"""Of a scale: means of 127 units are finite."""
_HEAD = Struct("<BBBxHHHxxIIIQ")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheGenOptions:
    """How much may be lost."""

    level: Literal["high", "default", "small"] = "default"
    """About 4.8, 3.3 and 2.4 bits an element; KL on a small model 7e-4, 5e-3 and 3e-2 nats."""


class Head(NamedTuple):
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


class Profile(NamedTuple):
    """How a frame's numbers are rounded and coded."""

    means: npt.NDArray[np.float32]
    """[planes, channels], as are all."""
    steps: npt.NDArray[np.float32]
    tabid: npt.NDArray[np.uint8]
    book: Codebook


class CacheGen(Lossy):
    """Head; what turns K, float32 [half]; steps and units of means, float32 [planes]; states and
    counts of the streams; escapes; the first tokens; words of the streams; means int8 and tables'
    numbers [planes, channels]."""

    Options = CacheGenOptions
    codec = CACHEGEN

    def __init__(self, options: CacheGenOptions, ctx: Context) -> None:
        self._freqs, self._layer, self._head = NONE, 0, 0
        if ctx is not None:
            self._layer, self._head = ctx.names.layers[0], ctx.names.heads[0]
            self._freqs = frequencies(ctx.names.rope, ctx.geometry.dim)
        super().__init__(options, ctx)

    def quantise(self, x: Array, shape: FrameShape) -> memoryview | None:
        first = min(max(FIRST - shape.start, 0), shape.tokens) if shape.start >= 0 else 0
        grid = _grid(shape, first)
        if grid is None:
            return None
        known = shape.start >= 0 and shape.kv == 2  # one plane of K and V is a latent
        freqs = self._freqs if known else NONE
        rows = x.reshape(shape.planes, shape.tokens, shape.channels)
        number, *factors = LEVELS[self.options.level]
        turns = _turns(max(shape.start, 0), shape.tokens, freqs.tobytes())
        own = _measure(rows, first, shape, turns, factors)
        if own is None:
            return None
        steps, units, means = own
        q = np.empty((shape.planes, grid.tokens, shape.channels), np.int16)
        tabid = np.empty(means.shape, np.uint8)
        profile = Profile(_floats(means, units), _spread(steps, means.shape), tabid, standard())
        where = first, shape.layers if len(freqs) else 0, *turns, shape.dim
        if not cpu.quantise(rows, *where, profile.means, profile.steps, q):
            return None
        cpu.choose_tables(q, profile.book.costs, tabid)
        symbols, places, values = _symbols(q, profile)
        words, counts, states = _coded(grid, profile, symbols)
        head = Head(
            1, number, first, len(freqs), self._layer + shape.first_layer, self._head,
            max(shape.start, 0), len(places), len(words), 0,
        )  # fmt: skip
        made, arrays = fresh(_HEAD.pack(*head), _parts(shape, head, grid))
        spared = rows[:, :first]
        parts = (freqs, steps, units, states, counts, places, values, spared, words, means, tabid)
        for array, part in zip(arrays, parts, strict=True):
            array[...] = part
        return made


def from_cachegen(data: Bytes, shape: FrameShape, site: Site | None = None) -> Bytes:
    """Inverse of `CacheGen.quantise`. Raises BadObject."""
    head = Head(*head_of(data, _HEAD, shape))
    grid = _grid(shape, head.first)
    if grid is None or 2 * head.half > shape.dim or (head.half and shape.kv != 2):
        raise BadObject(f"cachegen: {head} in {shape}")
    parts = parted(data, _HEAD.size, _parts(shape, head, grid))
    freqs, steps, units, states, counts, places, values, spared, words, means, tabid = (
        part.copy() for part in parts  # writable, as compiled code knows them
    )  # fmt: skip
    if not all((np.abs(a) <= _MOST).all() for a in (freqs, steps, units)):
        raise BadObject("cachegen: scales that no encoder writes")
    symbols = np.empty((shape.planes, grid.tokens, shape.channels), np.uint8)
    status = np.empty(counts.shape, np.uint8)
    decode_streams(grid, standard().tables, words, counts, states, tabid, symbols, status)
    if (status != DONE).any():
        raise BadObject("cachegen: a stream does not end where it should")
    x = blank(shape)
    rows = x.reshape(shape.planes, shape.tokens, shape.channels)
    rows[:, : head.first] = spared
    turns = _turns(head.start, shape.tokens, freqs.tobytes())
    where = head.first, shape.layers if head.half else 0, *turns, shape.dim
    scales = _floats(means, units), _spread(steps, means.shape)
    if cpu.dequantise(symbols, *where, *scales, places, values, rows) != len(places):
        raise BadObject("cachegen: escapes out of their places")
    return as_bytes(x)


def _grid(shape: FrameShape, first: int) -> StreamGrid | None:
    """None where nothing is left to code, or more than the coder counts."""
    left = shape.tokens - first
    if left < 1 or shape.planes * left * shape.channels >= 1 << 32:
        return None
    try:
        return StreamGrid.of(shape.planes, left, shape.channels)
    except ValueError:
        return None


def _parts(shape: FrameShape, head: Head, grid: StreamGrid) -> tuple[Part, ...]:
    planes, channels = shape.planes, shape.channels
    return (
        (np.float32, (head.half,)),
        (np.float32, (planes,)),
        (np.float32, (planes,)),
        (np.uint32, (planes, grid.groups, grid.lanes)),
        (np.uint32, (planes, grid.groups)),
        (np.uint32, (head.escapes,)),
        (np.int32, (head.escapes,)),
        (ELEMENTS[shape.dtype], (planes, head.first, channels)),
        (np.uint16, (head.words,)),
        (np.int8, (planes, channels)),
        (np.uint8, (planes, channels)),
    )


@lru_cache(64)
def _turns(start: int, tokens: int, freqs: bytes) -> Turns:
    return cpu.turns(start, tokens, np.frombuffer(freqs, np.float32))


def _measure(
    rows: Array, first: int, shape: FrameShape, turns: Turns, factors: list[float]
) -> tuple[Array, Array, Array] | None:
    """Steps and units float32 [planes], means int8 [planes, channels] in units; None where
    something is not finite."""
    turned = shape.layers if turns[0].shape[1] else 0
    means, spreads = np.empty((2, shape.planes, shape.channels))
    if not cpu.moments(rows, first, turned, *turns, shape.dim, means, spreads):
        return None
    share = np.repeat(factors[-shape.kv :], shape.layers)
    deviation = np.sqrt(spreads.mean(axis=1))
    steps = np.where(deviation > _LEAST, share * deviation, 0)
    units = np.abs(means).max(axis=1) / 127
    units = np.where(units > _LEAST, units, 0)
    near = np.rint(np.divide(means, units[:, None], where=units[:, None] > 0, out=means * 0))
    if not max(steps.max(), units.max()) < _MOST:
        return None
    return steps.astype(np.float32), units.astype(np.float32), near.clip(-127, 127).astype(np.int8)


def _floats(means: Array, units: Array) -> npt.NDArray[np.float32]:
    made: npt.NDArray[np.float32] = means * units[:, None]
    return made


def _spread(steps: Array, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.broadcast_to(steps[:, None], shape).copy()


def _symbols(q: Array, profile: Profile) -> tuple[Array, Array, Array]:
    """Symbols like q, and the escapes: places uint32 and values int32."""
    symbols = np.empty(q.shape, np.uint8)
    room = q.size // 256
    while True:
        places, values = np.empty(room, np.uint32), np.empty(room, np.int32)
        found = cpu.to_symbols(q, profile.book.reach, profile.tabid, symbols, places, values)
        if found <= room:
            return symbols, places[:found], values[:found]
        room = found


def _coded(grid: StreamGrid, profile: Profile, symbols: Array) -> tuple[Array, Array, Array]:
    """Words, counts and states of the streams."""
    lanes = (grid.planes, grid.groups, grid.lanes)
    counts, status = np.empty(lanes[:2], np.uint32), np.empty(lanes[:2], np.uint8)
    states, words = np.empty(lanes, np.uint32), np.empty(grid.most_words(BITS), np.uint16)
    tables, tabid = profile.book.tables, profile.tabid
    found = encode_streams(grid, tables, symbols, tabid, words, counts, states, status)
    assert (status == DONE).all(), "every symbol within reach has a frequency"
    return words[:found], counts, states
