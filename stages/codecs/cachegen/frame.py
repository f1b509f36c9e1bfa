"""A frame of `cachegen`: means and steps per channel, in the frame or a calibration's.

Head; states and counts of the streams; escapes; the first tokens; the streams' words. Where no
calibration has them: what turns K, float32 [half]; steps and units of means, float32 [planes];
means int8 and tables' numbers [planes, channels].
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tierloom.stages.codecs.cachegen.calibration import Calibration, by_id
from tierloom.stages.codecs.cachegen.codebook import Codebook, standard
from tierloom.stages.codecs.cachegen.coder import CodedArrays, CodedHead, coded, framed, grid_of
from tierloom.stages.codecs.contract.frame_shape import Bytes, FrameShape, Part, read_only
from tierloom.stages.codecs.contract.lossy import Array, as_bytes, blank
from tierloom.stages.errors import BadObject
from tierloom.triton_kernels.cachegen import cpu
from tierloom.triton_kernels.rans.format import StreamGrid

Turns = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]

STEPS = {"high": (0.13, 0.13), "default": (0.39, 0.39), "small": (0.85, 0.85)}
"""Of each level, steps of K and of V, as shares of a plane's deviation. Found
on texts to calibrate by; with other shares of K to V the same bits cost more."""
_NOWHERE = 0, 0, *cpu.turns(0, 0, np.zeros(0, np.float32))
"""For kernels: no first tokens, nothing is turned."""
_LEAST = 1e-30
"""Deviations below it are of planes that stand still: the inverse of a step would not be finite."""
MOST = 2e36
"""Of a scale: means of 127 units are finite."""


class Profile(NamedTuple):
    """How a frame's numbers are rounded and coded."""

    means: npt.NDArray[np.float32]
    """[planes, channels], as are all."""
    steps: npt.NDArray[np.float32]
    tabid: npt.NDArray[np.uint8]
    book: Codebook
    transform: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None
    """A transform of each head and its inverse, [planes, heads, dim, dim]: what is rounded are the
    coefficients of what lies around the means, and steps and tables are theirs. None: channels."""


class CodedFrame:
    """One frame on its way in."""

    def __init__(self, head: CodedHead, shape: FrameShape, grid: StreamGrid, freqs: Array) -> None:
        self.head, self.shape, self.grid = head, shape, grid
        self.where = place(head, shape, freqs)

    def own(
        self, rows: Array, freqs: Array, factors: tuple[float, float]
    ) -> tuple[Profile, tuple[Array, ...]] | None:
        """The profile of this very frame, and what of it must stand in its bytes; None where
        something is not finite."""
        found = self._measured(rows, factors)
        if found is None:
            return None
        steps, units, means = found
        tabid = np.empty(means.shape, np.uint8)
        profile = Profile(floats(means, units), spread(steps, means.shape), tabid, standard())
        return profile, (freqs, steps, units, means, tabid)

    def encoded(self, rows: Array, profile: Profile, own: tuple[Array, ...]) -> memoryview | None:
        """The frame's bytes. `own`: what of the profile must stand in them; its last, `tabid`, is
        then chosen here. None where a number is not finite or too many steps off."""
        shape, grid = self.shape, self.grid
        q = np.empty((shape.planes, grid.tokens, shape.channels), np.int16)
        if not self._quantized(rows, profile, q):
            return None
        if own:
            cpu.choose_tables(q, profile.book.costs, profile.tabid)
        parts = coded(q, profile.book, profile.tabid, grid, rows[:, : self.head.first])
        return framed(self.head, shape, grid, parts, own, own_parts(shape, self.head))

    def _quantized(self, rows: Array, profile: Profile, q: Array) -> bool:
        means, steps = profile.means, profile.steps
        if profile.transform is None:
            return bool(cpu.quantize(rows, *self.where, means, steps, q))
        y = np.empty(q.shape, np.float32)
        if not cpu.centered(rows, *self.where, means, y):
            return False
        y = read_only(_through(y, profile.transform[0]).view(np.uint32))
        return bool(cpu.quantize(y, *_NOWHERE, self.shape.dim, np.zeros_like(means), steps, q))

    def _measured(
        self, rows: Array, factors: tuple[float, float]
    ) -> tuple[Array, Array, Array] | None:
        """Steps and units float32 [planes], means int8 [planes, channels] in units."""
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
        if not max(steps.max(), units.max()) < MOST:
            return None
        scales = steps.astype(np.float32), units.astype(np.float32)
        return *scales, near.clip(-127, 127).astype(np.int8)


def decoded_frame(data: Bytes, head: CodedHead, shape: FrameShape) -> Bytes:
    """Inverse of `Frame.encoded`. Raises BadObject, also where a calibration is not at hand."""
    grid = grid_of(shape, head.first)
    halved = head.half or head.calibration
    if grid is None or 2 * head.half > shape.dim or (halved and shape.kv != 2):
        raise BadObject(f"cachegen: {head} in {shape}")
    more = () if head.calibration else own_parts(shape, head)
    read = CodedArrays(data, head, shape, grid, more)
    if head.calibration:
        model = by_id(head.calibration)
        freqs, profile = model.freqs, modelled(model, head, shape)
    else:
        freqs, steps, units, means, tabid = read.own
        if not all((np.abs(a) <= MOST).all() for a in (freqs, steps, units)):
            raise BadObject("cachegen: scales that no encoder writes")
        scales = floats(means, units), spread(steps, means.shape)
        profile = Profile(*scales, tabid, standard())
    symbols, escapes = read.symbols(profile.book, profile.tabid), (read.places, read.values)
    x = blank(shape)
    rows = x.reshape(shape.planes, shape.tokens, shape.channels)
    rows[:, : head.first] = read.spared
    where = place(head, shape, freqs)
    means, steps = profile.means, profile.steps
    if profile.transform is None:
        used = cpu.dequantize(symbols, *where, means, steps, *escapes, rows)
    else:
        y, flat = np.empty(symbols.shape, np.uint32), np.zeros_like(means)
        used = cpu.dequantize(symbols, *_NOWHERE, shape.dim, flat, steps, *escapes, y)
        cpu.uncentered(_through(y.view(np.float32), profile.transform[1]), *where, means, rows)
    if used != len(read.places):
        raise BadObject("cachegen: escapes out of their places")
    return as_bytes(x)


def modelled(model: Calibration, head: CodedHead, shape: FrameShape) -> Profile:
    """What a calibration says of a frame. Raises BadObject."""
    if head.level >= len(STEPS) or shape.dim != model.dim:
        raise BadObject(f"cachegen: {head} in {shape}")
    at = head.kv_head * shape.dim
    layers = range(head.layer, head.layer + shape.layers)
    return Profile(*model.slice(head.level, layers, range(at, at + shape.channels)))


def place(head: CodedHead, shape: FrameShape, freqs: Array) -> tuple[int, int, Array, Array, int]:
    """What the kernels must know of where a frame is: first, turned, cos, sin, dim."""
    turns = _turns(head.start, shape.tokens, freqs.tobytes())
    return head.first, shape.layers if len(freqs) else 0, *turns, shape.dim


def own_parts(shape: FrameShape, head: CodedHead) -> tuple[Part, ...]:
    planes, channels = shape.planes, shape.channels
    return (
        (np.float32, (head.half,)),
        (np.float32, (planes,)),
        (np.float32, (planes,)),
        (np.int8, (planes, channels)),
        (np.uint8, (planes, channels)),
    )


def _through(y: Array, matrices: Array) -> npt.NDArray[np.float32]:
    """Each head of `y` [planes, tokens, channels] through its matrix of `matrices`."""
    planes, tokens, _ = y.shape
    heads = y.reshape(planes, tokens, matrices.shape[1], -1).transpose(0, 2, 1, 3)
    with np.errstate(all="ignore"):  # damaged bytes may say any number
        made = np.matmul(heads, matrices.transpose(0, 1, 3, 2)).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(made).reshape(y.shape)


@lru_cache(64)
def _turns(start: int, tokens: int, freqs: bytes) -> Turns:
    return cpu.turns(start, tokens, np.frombuffer(freqs, np.float32))


def floats(means: Array, units: Array) -> npt.NDArray[np.float32]:
    made: npt.NDArray[np.float32] = means * units[:, None]
    return made


def spread(steps: Array, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.broadcast_to(steps[:, None], shape).copy()
