"""progressive: `cachegen` in three scans, so that a part of an object is all of it, but coarser.

    small: {use: progressive, from: host}
    fetch: {use: get, within: 200 ms}          # where it is retrieved

Lossy. The first scan holds what cachegen's level `small` would, in steps three times as wide as
those of `default`; the second says in which third of its step each number lies, and the third in
which ninth. A third of a step around zero is a step around zero: each level is a uniform quantizer,
as fine as if it stood alone, and all three together take 1 to 3 per cent more bytes than the
finest alone. What `get` has no time to read, nobody misses (CacheGen, arXiv 2310.07240, section
5.3, keeps one stream per level instead).

Thirds are symbols like others, coded by rANS with tables of a channel's own choice. Away from zero
they are counted outwards, since the third nearer to zero is the more frequent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from tierloom.stages.codecs.cachegen.codebook import BITS, Codebook, shapes, standard
from tierloom.stages.codecs.cachegen.coder import (
    HEAD,
    CodedArrays,
    CodedHead,
    coded,
    framed,
    grid_of,
    spared,
    to_symbols,
)
from tierloom.stages.codecs.cachegen.frame import MOST, CodedFrame, floats, own_parts, place, spread
from tierloom.stages.codecs.contract.decoding import PROGRESSIVE
from tierloom.stages.codecs.contract.frame_shape import ELEMENTS, Bytes, FrameShape, Part, Site
from tierloom.stages.codecs.contract.lossy import Array, Lossy, as_bytes, blank, elements
from tierloom.stages.contract.chunks import EncodedFrame
from tierloom.stages.contract.stage import Context
from tierloom.stages.errors import BadObject
from tierloom.stages.kv.rope import NONE, frequencies
from tierloom.triton_kernels.cachegen import cpu, thirds_cpu
from tierloom.triton_kernels.rans.tables import normalize

LEVELS = ("small", "default", "high")
"""The level that one, two or three scans amount to."""
STEP = 1.17
"""The widest, as a share of a plane's deviation."""
_AS_IT_IS = 0x80
"""Added to a scan's number where the frame's bytes follow as they are; later scans are empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressiveOptions:
    """How much may be lost when all of it is read."""

    level: Literal["high", "default", "small"] = "high"
    """The finest level: three scans, two or one; about 5, 3.5 and 2 bits an element."""


class Progressive(Lossy):
    """Each scan begins with a head as `cachegen` has it, whose level is the scan's number. The
    first goes on as a frame of cachegen does; each other one has its streams and their tables."""

    Options = ProgressiveOptions
    codec = PROGRESSIVE

    def __init__(self, options: ProgressiveOptions, ctx: Context) -> None:
        self.scans = 1 + LEVELS.index(options.level)
        self._freqs = NONE if ctx is None else frequencies(ctx.names.rope, ctx.geometry.dim)
        super().__init__(options, ctx)

    def parts(self, source: EncodedFrame, shape: FrameShape, site: Site) -> list[EncodedFrame]:
        """None passes: what cannot be coded goes whole in the first scan."""
        made: list[Bytes] | None = None
        if shape.dtype in ELEMENTS:
            made = self._scans(elements(source.data, shape), shape)
        if made is None:
            head = CodedHead(1, _AS_IT_IS, 0, 0, 0, 0, 0, 0, 0, 0)
            made = [HEAD.pack(*head) + bytes(source.data)]
            made += [HEAD.pack(*head._replace(level=_AS_IT_IS + k)) for k in range(1, self.scans)]
        return [EncodedFrame(scan, source.raw, bytes((PROGRESSIVE,))) for scan in made]

    def quantize(self, x: Array, shape: FrameShape) -> memoryview | None:
        """All scans, one after another."""
        made = self._scans(x, shape)
        return None if made is None else memoryview(b"".join(made))

    def _scans(self, x: Array, shape: FrameShape) -> list[Bytes] | None:
        first = spared(shape)
        grid = grid_of(shape, first)
        if grid is None:
            return None
        freqs = self._freqs if shape.start >= 0 and shape.kv == 2 else NONE
        head = CodedHead(1, 0, first, len(freqs), 0, 0, max(shape.start, 0), 0, 0, 0)
        rows = x.reshape(shape.planes, shape.tokens, shape.channels)
        frame = CodedFrame(head, shape, grid, freqs)
        found = frame.own(rows, freqs, (STEP, STEP))
        if found is None:
            return None
        profile, own = found
        finest = profile.steps / np.float32(3 ** (self.scans - 1))
        q = np.empty((shape.planes, grid.tokens, shape.channels), np.int16)
        if not cpu.quantize(rows, *frame.where, profile.means, finest, q):
            return None
        if np.abs(q).max() > thirds_cpu.FAR:
            return None
        thirds: list[Array] = []
        for _ in range(1, self.scans):
            third = np.empty_like(q)
            thirds_cpu.part(q.reshape(-1), q.reshape(-1), third.reshape(-1))
            thirds.insert(0, third)
        cpu.choose_tables(q, profile.book.costs, profile.tabid)
        parts = coded(q, profile.book, profile.tabid, grid, rows[:, :first])
        made: list[Bytes] = [framed(head, shape, grid, parts, own, own_parts(shape, head))]
        for k, third in enumerate(thirds, 1):
            tabid = np.empty_like(profile.tabid)
            cpu.choose_tables(third, thirds_book().costs, tabid)
            parts = coded(third, thirds_book(), tabid, grid, rows[:, :0])
            finer = head._replace(level=k, first=0)
            made.append(framed(finer, shape, grid, parts, (tabid,), _tables(shape)))
        return made


def describe(data: bytes, codecs: bytes, scan: int) -> str:
    """The level that an object has when it is read up to and with this scan."""
    return f", to {LEVELS[scan]}" if scan < len(LEVELS) else ""


def from_progressive(data: Bytes, shape: FrameShape, site: Site | None = None) -> Bytes:
    """Inverse of `Progressive.parts`, of the scans that there are, one after another. Raises
    BadObject."""
    view, at = memoryview(data).cast("B"), 0
    scans: list[_Scan] = []
    while at < view.nbytes or not scans:
        scan = _Scan(view[at:], shape, scans)
        scans.append(scan)
        at += scan.nbytes
    head = scans[0].head
    if head.level == _AS_IT_IS:
        return scans[0].body
    base = scans[0].arrays
    freqs, steps, units, means, tabid = base.own
    if not all((np.abs(a) <= MOST).all() for a in (freqs, steps, units)):
        raise BadObject("progressive: scales that no encoder writes")
    symbols, places, values = base.symbols(standard(), tabid), base.places, base.values
    if len(scans) > 1:
        q = symbols.astype(np.int16) - np.int16(cpu.CENTER)
        flat = q.reshape(-1)
        far = thirds_cpu.FAR // 3 ** (len(scans) - 1)
        if (places >= flat.size).any() or (np.abs(values) > far).any():
            raise BadObject("progressive: escapes out of their places")
        flat[places] = values
        for finer in (scan.arrays for scan in scans[1:]):
            thirds_cpu.join(flat, finer.symbols(thirds_book(), finer.own[0]).reshape(-1))
        symbols, places, values = to_symbols(q, _everything(), np.zeros_like(tabid))
    x = blank(shape)
    rows = x.reshape(shape.planes, shape.tokens, shape.channels)
    rows[:, : head.first] = base.spared
    step = spread(steps / np.float32(3 ** (len(scans) - 1)), means.shape)
    where = place(head, shape, freqs)
    used = cpu.dequantize(symbols, *where, floats(means, units), step, places, values, rows)
    if used != len(places):
        raise BadObject("progressive: escapes out of their places")
    return as_bytes(x)


class _Scan:
    """One scan, as it was read."""

    def __init__(self, data: memoryview, shape: FrameShape, before: list[_Scan]) -> None:
        """`data` may go on after it. Raises BadObject."""
        if data.nbytes < HEAD.size or data[0] != 1:
            raise BadObject("progressive: no scan that this tierloom knows")
        self.head = head = CodedHead(*HEAD.unpack_from(data))
        base = before[0].head if before else head
        kind = base.level & _AS_IT_IS
        if head.level != kind + len(before) or len(before) == len(LEVELS):
            raise BadObject(f"progressive: scan {head.level} where {len(before)} should stand")
        if kind:
            self.nbytes = HEAD.size + (0 if before else shape.nbytes)
            self.body = data[HEAD.size : self.nbytes]
            return
        grid = grid_of(shape, base.first)
        fits = shape.dtype in ELEMENTS and 2 * head.half <= shape.dim
        fits = fits and (head.half, head.start) == (base.half, base.start)
        if grid is None or not fits or (head.half and shape.kv != 2) or (before and head.first):
            raise BadObject(f"progressive: {head} in {shape}")
        more = _tables(shape) if before else own_parts(shape, head)
        self.arrays = CodedArrays(data, head, shape, grid, more, goes_on=True)
        self.nbytes = self.arrays.nbytes


@lru_cache(1)
def thirds_book() -> Codebook:
    """Tables of thirds, for each of the shapes that `standard` has tables for."""
    counts = shapes()
    q = np.arange(-cpu.CENTER, cpu.CENTER, dtype=np.int16)
    third = np.empty_like(q)
    thirds_cpu.part(q, np.empty_like(q), third)
    made = np.zeros(counts.shape, np.int64)
    for t in (-1, 0, 1):
        made[:, cpu.CENTER + t] = counts[:, third == t].sum(axis=1)
    floor = np.zeros(cpu.SYMBOLS, np.int64)
    floor[[cpu.ESCAPE, cpu.CENTER - 1, cpu.CENTER, cpu.CENTER + 1]] = 1
    return Codebook.of(normalize(made, BITS, floor))


@lru_cache(1)
def _everything() -> Codebook:
    """A table that has every symbol."""
    return Codebook.of(np.full((1, cpu.SYMBOLS), (1 << BITS) // cpu.SYMBOLS))


def _tables(shape: FrameShape) -> tuple[Part, ...]:
    return ((np.uint8, (shape.planes, shape.channels)),)
