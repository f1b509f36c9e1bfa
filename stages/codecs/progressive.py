"""progressive: `cachegen` in three scans, so that a part of an object is all of it, but coarser.

    small: {use: progressive, from: host}
    fetch: {use: get, within: 200 ms}          # where it is retrieved

Lossy. The first scan holds what cachegen's level `small` would, in steps three times as wide as
those of `default`; the second says in which third of its step each number lies, and the third in
which ninth. A third of a step around zero is a step around zero: each level is a uniform quantiser,
as fine as if it stood alone, and all three together take 1 to 3 per cent more bytes than the
finest alone. What `get` has no time to read, nobody misses (CacheGen, arXiv 2310.07240, section
5.3, keeps one stream per level instead).

Thirds are symbols like others, coded by rANS with tables of a channel's own choice. Away from zero
they are counted outwards, since the third nearer to zero is the more frequent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ...triton_kernels import cachegen_cpu as cpu
from ...triton_kernels import thirds_cpu
from ...triton_kernels.rans_cpu import decode_streams
from ...triton_kernels.rans_format import DONE
from ...triton_kernels.rans_tables import normalise
from ..errors import BadObject
from ..payload import EncodedFrame
from .cachegen import FIRST, Profile, _coded, _floats, _Frame, _grid, _spread, _symbols
from .cachegen import Head as CacheGenHead
from .cachegen_tables import BITS, Codebook, shapes, standard
from .lossy import Lossy, as_bytes, blank, elements
from .rope import NONE, frequencies
from .shape import ELEMENTS, fresh, parted, sized
from .table import PROGRESSIVE

if TYPE_CHECKING:
    import numpy.typing as npt

    from ...triton_kernels.rans_format import StreamGrid
    from ..base import Context
    from .lossy import Array
    from .shape import Bytes, FrameShape, Part, Site

STEP = 1.17
"""The widest, as a share of a plane's deviation."""
_MOST = 2e36
"""Of a scale: means of 127 units are finite."""
_AS_IT_IS, _CODED = 0, 1
_HEAD = Struct("<BBBxHHIII")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressiveOptions:
    """How much may be lost when all of it is read."""

    level: Literal["high", "default", "small"] = "high"
    """The finest level: three scans, two or one; about 5, 3.5 and 2 bits an element."""


class Head(NamedTuple):
    """What a frame of each scan begins with."""

    version: int
    scan: int
    kind: int
    """1: coded; 0: the frame's bytes follow as they are, and later scans are empty."""
    first: int
    """Tokens that are kept as they are."""
    half: int
    """Pairs of channels of a head that are turned back."""
    start: int
    """The position of the first token, where K is turned back."""
    escapes: int
    words: int


class Progressive(Lossy):
    """Each scan: head; states and counts of its streams; words; tables' numbers. The first, too:
    escapes; first tokens; what turns K; steps, units of means, means."""

    Options = ProgressiveOptions
    codec = PROGRESSIVE

    def __init__(self, options: ProgressiveOptions, ctx: Context) -> None:
        self.scans = 3 - ("high", "default", "small").index(options.level)
        self._freqs = NONE if ctx is None else frequencies(ctx.names.rope, ctx.geometry.dim)
        super().__init__(options, ctx)

    def parts(self, source: EncodedFrame, shape: FrameShape, site: Site) -> list[EncodedFrame]:
        """None passes: what cannot be coded goes whole in the first scan."""
        made: list[Bytes] | None = None
        if shape.dtype in ELEMENTS:
            made = self._scans(elements(source.data, shape), shape)
        if made is None:
            head = Head(1, 0, _AS_IT_IS, 0, 0, 0, 0, 0)
            made = [_HEAD.pack(*head) + bytes(source.data)]
            made += [_HEAD.pack(*head._replace(scan=k)) for k in range(1, self.scans)]
        return [EncodedFrame(scan, source.raw, bytes((PROGRESSIVE,))) for scan in made]

    def quantise(self, x: Array, shape: FrameShape) -> memoryview | None:
        """All scans, one behind another."""
        made = self._scans(x, shape)
        return None if made is None else memoryview(b"".join(made))

    def _scans(self, x: Array, shape: FrameShape) -> list[Bytes] | None:
        first = min(max(FIRST - shape.start, 0), shape.tokens) if shape.start >= 0 else 0
        grid = _grid(shape, first)
        if grid is None:
            return None
        freqs = self._freqs if shape.start >= 0 and shape.kv == 2 else NONE
        head = Head(1, 0, _CODED, first, len(freqs), max(shape.start, 0), 0, 0)
        rows = x.reshape(shape.planes, shape.tokens, shape.channels)
        frame = _Frame(_place(head), shape, grid, freqs)
        own = frame.measure(rows, (STEP, STEP))
        if own is None:
            return None
        steps, units, means = own
        finest = _spread(steps / np.float32(3 ** (self.scans - 1)), means.shape)
        q = np.empty((shape.planes, grid.tokens, shape.channels), np.int16)
        if not cpu.quantise(rows, *frame.where, _floats(means, units), finest, q):
            return None
        if np.abs(q).max() > thirds_cpu.FAR:
            return None
        thirds: list[Array] = []
        for _ in range(1, self.scans):
            third = np.empty_like(q)
            thirds_cpu.part(q.reshape(-1), q.reshape(-1), third.reshape(-1))
            thirds.insert(0, third)
        tabid, places, values, *coded = _streams(grid, q, standard())
        head = head._replace(escapes=len(places), words=len(coded[0]))
        more = (places, values, rows[:, :first], freqs, steps, units, means)
        made: list[Bytes] = [_written(head, shape, grid, (*coded, tabid, *more))]
        for k, third in enumerate(thirds, 1):
            tabid, _, _, *coded = _streams(grid, third, thirds_book())
            finer = head._replace(scan=k, escapes=0, words=len(coded[0]))
            made.append(_written(finer, shape, grid, (*coded, tabid)))
        return made


def from_progressive(data: Bytes, shape: FrameShape, site: Site | None = None) -> Bytes:
    """Inverse of `Progressive.parts`, of as many scans, one behind another, as there are. Raises
    BadObject."""
    view, at = memoryview(data).cast("B"), 0
    scans: list[_Scan] = []
    while at < view.nbytes:
        scan = _Scan(view[at:], shape)
        if scan.head.scan != len(scans) or len(scans) == 3:
            raise BadObject(f"progressive: scan {scan.head.scan} stands where {len(scans)} should")
        if scans and scan.head[2:6] != scans[0].head[2:6]:
            raise BadObject("progressive: scans of different frames")
        scans.append(scan)
        at += scan.nbytes
    if not scans:
        raise BadObject("progressive: no scan")
    base = scans[0]
    if base.head.kind == _AS_IT_IS:
        return base.body
    tabid, places, values, spared, freqs, steps, units, means = base.rest
    if not all((np.abs(a) <= _MOST).all() for a in (freqs, steps, units)):
        raise BadObject("progressive: scales that no encoder writes")
    symbols = base.symbols(tabid, standard())
    if len(scans) > 1:
        q = symbols.astype(np.int16) - np.int16(cpu.CENTRE)
        flat = q.reshape(-1)
        if (places >= flat.size).any() or (
            np.abs(values) > thirds_cpu.FAR // 3 ** (len(scans) - 1)
        ).any():
            raise BadObject("progressive: escapes out of their places")
        flat[places] = values
        for scan in scans[1:]:
            third = scan.symbols(scan.rest[0], thirds_book())
            thirds_cpu.join(flat, third.reshape(-1))
        alike = Profile(means, steps, np.zeros(means.shape, np.uint8), _everything())
        symbols, places, values = _symbols(q, alike)
    x = blank(shape)
    rows = x.reshape(shape.planes, shape.tokens, shape.channels)
    rows[:, : base.head.first] = spared
    where = _Frame(_place(base.head), shape, base.grid, freqs).where
    step = _spread(steps / np.float32(3 ** (len(scans) - 1)), means.shape)
    used = cpu.dequantise(symbols, *where, _floats(means, units), step, places, values, rows)
    if used != len(places):
        raise BadObject("progressive: escapes out of their places")
    return as_bytes(x)


class _Scan:
    """One scan, as it was read."""

    def __init__(self, data: memoryview, shape: FrameShape) -> None:
        """`data` may go on behind it. Raises BadObject."""
        if data.nbytes < _HEAD.size or data[0] != 1:
            raise BadObject("progressive: no scan that this tierloom knows")
        self.head = head = Head(*_HEAD.unpack_from(data))
        if head.kind == _AS_IT_IS:
            self.nbytes = _HEAD.size + (0 if head.scan else shape.nbytes)
            self.body = data[_HEAD.size : self.nbytes]
            return
        grid = _grid(shape, head.first)
        fits = shape.dtype in ELEMENTS and head.kind == _CODED and 2 * head.half <= shape.dim
        if grid is None or not fits or (head.half and shape.kv != 2):
            raise BadObject(f"progressive: {head} in {shape}")
        parts = _parts(shape, head, grid)
        self.grid, self.nbytes = grid, _HEAD.size + sized(parts)
        # Copies are writable, as compiled code knows its arrays.
        arrays = [a.copy() for a in parted(data[: self.nbytes], _HEAD.size, parts)]
        self.words, self.counts, self.states, *self.rest = arrays

    def symbols(self, tabid: Array, book: Codebook) -> npt.NDArray[np.uint8]:
        """Raises BadObject."""
        grid = self.grid
        made = np.empty((grid.planes, grid.tokens, grid.channels), np.uint8)
        status = np.empty(self.counts.shape, np.uint8)
        if tabid.max() >= len(book.tables):
            raise BadObject("progressive: a table that is not there")
        decode_streams(grid, book.tables, self.words, self.counts, self.states, tabid, made, status)
        if (status != DONE).any():
            raise BadObject("progressive: a stream does not end where it should")
        return made


@lru_cache(1)
def thirds_book() -> Codebook:
    """Tables of thirds, for each of the shapes that `standard` has tables for."""
    counts = shapes()
    q = np.arange(-cpu.CENTRE, cpu.CENTRE, dtype=np.int16)
    third = np.empty_like(q)
    thirds_cpu.part(q, np.empty_like(q), third)
    made = np.zeros(counts.shape, np.int64)
    for t in (-1, 0, 1):
        made[:, cpu.CENTRE + t] = counts[:, third == t].sum(axis=1)
    floor = np.zeros(cpu.SYMBOLS, np.int64)
    floor[[cpu.ESCAPE, cpu.CENTRE - 1, cpu.CENTRE, cpu.CENTRE + 1]] = 1
    return Codebook.of(normalise(made, BITS, floor))


@lru_cache(1)
def _everything() -> Codebook:
    """A table that has every symbol."""
    return Codebook.of(np.full((1, cpu.SYMBOLS), (1 << BITS) // cpu.SYMBOLS))


def _streams(grid: StreamGrid, q: Array, book: Codebook) -> tuple[Array, ...]:
    """Tables' numbers; escapes; words, counts and states."""
    tabid = np.empty((grid.planes, grid.channels), np.uint8)
    cpu.choose_tables(q, book.costs, tabid)
    profile = Profile(NONE, NONE, tabid, book)
    symbols, places, values = _symbols(q, profile)
    return tabid, places, values, *_coded(grid, profile, symbols)


def _parts(shape: FrameShape, head: Head, grid: StreamGrid) -> tuple[Part, ...]:
    planes, channels = shape.planes, shape.channels
    always: tuple[Part, ...] = (
        (np.uint16, (head.words,)),
        (np.uint32, (planes, grid.groups)),
        (np.uint32, (planes, grid.groups, grid.lanes)),
        (np.uint8, (planes, channels)),
    )
    if head.scan:
        return always
    return (
        *always,
        (np.uint32, (head.escapes,)),
        (np.int32, (head.escapes,)),
        (ELEMENTS[shape.dtype], (planes, head.first, channels)),
        (np.float32, (head.half,)),
        (np.float32, (planes,)),
        (np.float32, (planes,)),
        (np.int8, (planes, channels)),
    )


def _place(head: Head) -> CacheGenHead:
    return CacheGenHead(1, 0, head.first, head.half, 0, 0, head.start, 0, 0, 0)


def _written(
    head: Head, shape: FrameShape, grid: StreamGrid, arrays: tuple[Array, ...]
) -> memoryview:
    made, parts = fresh(_HEAD.pack(*head), _parts(shape, head, grid))
    for part, array in zip(parts, arrays, strict=True):
        part[...] = array
    return made
