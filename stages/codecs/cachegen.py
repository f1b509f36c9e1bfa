"""cachegen: entropy-coded numbers, whose steps are as fine as the level wants: 2.4 to 4.8 bits.

    small: {use: cachegen, from: host, level: default}

Lossy. After CacheGen (Liu et al., arXiv 2310.07240), with three changes that a real model asked
for: K's rotary position embedding is undone, each channel's mean is subtracted (in place of deltas
to anchor tokens), and probabilities are not kept per chunk: a channel names one of 64 tables. Then
what remains is rounded to steps and coded by interleaved rANS (`rans_format.py`). The first tokens
of a sequence, which draw most attention and lie far out, are kept as they are.

Without a calibration of the model (`tierloom calibrate`) means and tables' numbers are in each
frame, which any config reads, with no file. With one they are the model's (`calibration.py`), and
steps are finest where attention looks: K's by its queries, V's by the projection behind it.
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
from ..errors import BadObject, ConfigError
from .cachegen_tables import BITS, Codebook, standard
from .calibration import by_id, for_model, read
from .lossy import Lossy, as_bytes, blank, head_of
from .rope import NONE, frequencies
from .shape import ELEMENTS, fresh, parted
from .table import CACHEGEN

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..base import Context
    from .calibration import Calibration
    from .lossy import Array
    from .shape import Bytes, FrameShape, Part, Site

    Turns = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]

FIRST = 4
"""Tokens at the start of a sequence that are kept as they are."""
LEVELS = {"high": (0.15, 0.15), "default": (0.42, 0.42), "small": (0.85, 0.85)}
"""Steps of K and of V, as shares of a plane's deviation. Found
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
    calibration: str | None = None
    """A file that `tierloom calibrate` wrote; none: that of the model, where there is one in
    ~/.cache/tierloom/calibrations. Readers need it too."""


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
    """Head; states and counts of the streams; escapes; the first tokens; the streams' words. Where
    no calibration has them: what turns K, float32 [half]; steps and units of means, float32
    [planes]; means int8 and tables' numbers [planes, channels]."""

    Options = CacheGenOptions
    codec = CACHEGEN

    def __init__(self, options: CacheGenOptions, ctx: Context) -> None:
        self._freqs, self._layer, self._head = NONE, 0, 0
        if ctx is not None:
            self._layer, self._head = ctx.names.layers[0], ctx.names.heads[0]
            self._freqs = frequencies(ctx.names.rope, ctx.geometry.dim)
        self._model = _model(options, ctx)
        super().__init__(options, ctx)

    def quantise(self, x: Array, shape: FrameShape) -> memoryview | None:
        first = min(max(FIRST - shape.start, 0), shape.tokens) if shape.start >= 0 else 0
        grid = _grid(shape, first)
        if grid is None:
            return None
        known = shape.start >= 0 and shape.kv == 2  # one plane of K and V is a latent
        model = self._model if known else None
        level = list(LEVELS).index(self.options.level)
        head = Head(
            1, level, first, 0, self._layer + shape.first_layer, self._head,
            max(shape.start, 0), 0, 0, model.id if model else 0,
        )  # fmt: skip
        rows = x.reshape(shape.planes, shape.tokens, shape.channels)
        if model:
            frame = _Frame(head, shape, grid, model.freqs)
            made = frame.encoded(rows, _modelled(model, head, shape), ())
            if made is not None:
                return made  # else it is too far from what the model was seen to do
        freqs = self._freqs if known else NONE
        frame = _Frame(head._replace(half=len(freqs), calibration=0), shape, grid, freqs)
        own = frame.measure(rows, LEVELS[self.options.level])
        if own is None:
            return None
        steps, units, means = own
        tabid = np.empty(means.shape, np.uint8)
        profile = Profile(_floats(means, units), _spread(steps, means.shape), tabid, standard())
        return frame.encoded(rows, profile, (freqs, steps, units, means, tabid))


def from_cachegen(data: Bytes, shape: FrameShape, site: Site | None = None) -> Bytes:
    """Inverse of `CacheGen.quantise`. Raises BadObject, also where a calibration is not at hand."""
    head = Head(*head_of(data, _HEAD, shape))
    grid = _grid(shape, head.first)
    halved = head.half or head.calibration
    if grid is None or 2 * head.half > shape.dim or (halved and shape.kv != 2):
        raise BadObject(f"cachegen: {head} in {shape}")
    parts = parted(data, _HEAD.size, _parts(shape, head, grid))
    # Copies are writable, as compiled code knows its arrays.
    states, counts, places, values, spared, words, *own = (part.copy() for part in parts)
    if head.calibration:
        model = by_id(head.calibration)
        freqs, profile = model.freqs, _modelled(model, head, shape)
    else:
        freqs, steps, units, means, tabid = own
        if not all((np.abs(a) <= _MOST).all() for a in (freqs, steps, units)):
            raise BadObject("cachegen: scales that no encoder writes")
        scales = _floats(means, units), _spread(steps, means.shape)
        profile = Profile(*scales, tabid, standard())
    symbols = np.empty((shape.planes, grid.tokens, shape.channels), np.uint8)
    status = np.empty(counts.shape, np.uint8)
    tables, tabid = profile.book.tables, profile.tabid
    decode_streams(grid, tables, words, counts, states, tabid, symbols, status)
    if (status != DONE).any():
        raise BadObject("cachegen: a stream does not end where it should")
    x = blank(shape)
    rows = x.reshape(shape.planes, shape.tokens, shape.channels)
    rows[:, : head.first] = spared
    where = _Frame(head, shape, grid, freqs).where
    used = cpu.dequantise(symbols, *where, profile.means, profile.steps, places, values, rows)
    if used != len(places):
        raise BadObject("cachegen: escapes out of their places")
    return as_bytes(x)


class _Frame:
    """One frame on its way in."""

    def __init__(self, head: Head, shape: FrameShape, grid: StreamGrid, freqs: Array) -> None:
        self.head, self.shape, self.grid = head, shape, grid
        turns = _turns(head.start, shape.tokens, freqs.tobytes())
        self.where = head.first, shape.layers if len(freqs) else 0, *turns, shape.dim
        """What the kernels must know of its place."""

    def measure(
        self, rows: Array, factors: tuple[float, float]
    ) -> tuple[Array, Array, Array] | None:
        """Steps and units float32 [planes], means int8 [planes, channels] in units; None where
        something is not finite."""
        shape = self.shape
        means, spreads = np.empty((2, shape.planes, shape.channels))
        if not cpu.moments(rows, *self.where, means, spreads):
            return None
        share = np.repeat(factors[-shape.kv :], shape.layers)
        deviation = np.sqrt(spreads.mean(axis=1))
        steps = np.where(deviation > _LEAST, share * deviation, 0)
        units = np.abs(means).max(axis=1) / 127
        units = np.where(units > _LEAST, units, 0)
        near = np.rint(np.divide(means, units[:, None], where=units[:, None] > 0, out=means * 0))
        if not max(steps.max(), units.max()) < _MOST:
            return None
        scales = steps.astype(np.float32), units.astype(np.float32)
        return *scales, near.clip(-127, 127).astype(np.int8)

    def encoded(self, rows: Array, profile: Profile, own: tuple[Array, ...]) -> memoryview | None:
        """The frame's bytes. `own`: what of the profile must stand in them; its last, `tabid`, is
        then chosen here. None where a number is not finite or too many steps off."""
        shape, grid = self.shape, self.grid
        q = np.empty((shape.planes, grid.tokens, shape.channels), np.int16)
        if not cpu.quantise(rows, *self.where, profile.means, profile.steps, q):
            return None
        if own:
            cpu.choose_tables(q, profile.book.costs, profile.tabid)
        symbols, places, values = _symbols(q, profile)
        words, counts, states = _coded(grid, profile, symbols)
        head = self.head._replace(escapes=len(places), words=len(words))
        made, arrays = fresh(_HEAD.pack(*head), _parts(shape, head, grid))
        spared = rows[:, : head.first]
        parts = (states, counts, places, values, spared, words, *own)
        for array, part in zip(arrays, parts, strict=True):
            array[...] = part
        return made


def _model(options: CacheGenOptions, ctx: Context | None) -> Calibration | None:
    """The calibration to encode by. Raises ConfigError where one is named that does not fit."""
    if options.calibration is not None:
        found = read(options.calibration)
        if ctx is not None and not _fits(found, ctx):
            raise ConfigError(
                f"calibration {options.calibration} is of another model: it has "
                f"{found.means.shape[1]} layers of {found.means.shape[2] // found.dim} KV heads of "
                f"{found.dim} channels; write one with tierloom calibrate"
            )
        return found
    here = for_model(ctx.names.weights) if ctx is not None else None
    return here if here is not None and ctx is not None and _fits(here, ctx) else None


def _fits(found: Calibration, ctx: Context) -> bool:
    g, n = ctx.geometry, ctx.names
    _, layers, channels = found.means.shape
    last = (n.heads[0] + g.heads) * g.dim
    return (
        g.kv == 2 and g.dim == found.dim and n.layers[0] + g.layers <= layers and last <= channels
    )


def _modelled(model: Calibration, head: Head, shape: FrameShape) -> Profile:
    """Raises BadObject."""
    if head.level >= len(LEVELS) or shape.dim != model.dim:
        raise BadObject(f"cachegen: {head} in {shape}")
    at = head.kv_head * shape.dim
    layers = range(head.layer, head.layer + shape.layers)
    return Profile(*model.slice(head.level, layers, range(at, at + shape.channels)))


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
    always: tuple[Part, ...] = (
        (np.uint32, (planes, grid.groups, grid.lanes)),
        (np.uint32, (planes, grid.groups)),
        (np.uint32, (head.escapes,)),
        (np.int32, (head.escapes,)),
        (ELEMENTS[shape.dtype], (planes, head.first, channels)),
        (np.uint16, (head.words,)),
    )
    if head.calibration:
        return always
    return (
        *always,
        (np.float32, (head.half,)),
        (np.float32, (planes,)),
        (np.float32, (planes,)),
        (np.int8, (planes, channels)),
        (np.uint8, (planes, channels)),
    )


@lru_cache(64)
def _turns(start: int, tokens: int, freqs: bytes) -> Turns:
    return cpu.turns(start, tokens, np.frombuffer(freqs, np.float32))


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
