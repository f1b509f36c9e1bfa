"""The tables that `cachegen` codes with where no calibration has learned better ones.

64 of them: symbols of numbers around zero, Gaussian and Laplacian, of 32 widths from a tenth of a
step to 63 steps. They are part of the format, so nothing here may differ between machines: the
exponentials are Python's `decimal`, which rounds correctly everywhere, and the rest are integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tierloom.triton_kernels.cachegen.cpu import CENTER, ESCAPE, ESCAPE_BITS, SYMBOLS
from tierloom.triton_kernels.rans.tables import RansTables, normalize

BITS = 12
WIDTHS = 32
_EXACT = Context(prec=24)
_UNIT = Decimal(1 << 40)
_HALF, _ROOT = Decimal("-0.5"), Decimal("-1.41421356237309504880169")  # -sqrt(2)
_RARE = 1 << 14
"""What is rarer than one in this many, on both sides together, is left to escapes."""
_FAR = CENTER - 1


@dataclass(frozen=True, slots=True)
class Codebook:
    """Tables, and what the quantizer must know of them."""

    tables: RansTables
    reach: npt.NDArray[np.int32]
    """[tables] The largest q such that all of -q..q have a symbol."""
    costs: npt.NDArray[np.int32]
    """[tables, SYMBOLS] in 1/256 bit; what has no symbol costs an escape."""

    @classmethod
    def of(cls, freq: npt.NDArray[np.integer]) -> Codebook:
        """From frequencies [tables, SYMBOLS], each row adding up to 2^BITS. Raises ValueError,
        also where a table cannot escape."""
        if freq.ndim != 2 or freq.shape[1] != SYMBOLS or (freq[:, ESCAPE] < 1).any():
            raise ValueError(f"tables must be [tables, {SYMBOLS}] and know the escape")
        tables = RansTables.of(freq, BITS)
        both = np.minimum(freq[:, CENTER:], freq[:, CENTER:0:-1])  # of q and -q
        gone = np.concatenate([both == 0, np.ones((len(freq), 1), bool)], axis=1)
        reach = gone.argmax(axis=1) - 1
        if (reach < 0).any():
            raise ValueError("a table does not know zero")
        bits = BITS - np.log2(np.maximum(freq, 1))
        q = np.abs(np.arange(SYMBOLS) - CENTER)
        escaped = bits[:, ESCAPE, None] + ESCAPE_BITS
        cost = np.where(q <= reach[:, None], bits, escaped)
        return cls(tables, reach.astype(np.int32), np.rint(256 * cost).astype(np.int32))


def fitted(counts: npt.NDArray[np.integer]) -> npt.NDArray[np.uint16]:
    """Frequencies for counts [tables, SYMBOLS] of symbols: each table reaches, on both sides, as
    far as one number in `_RARE` lies, and can escape."""
    counts = np.asarray(counts, np.int64)
    q = np.abs(np.arange(SYMBOLS) - CENTER)
    inside = np.zeros(counts.shape, bool)
    for k, row in enumerate(counts):
        tail = np.bincount(q, row, CENTER + 1)[::-1].cumsum()[::-1]  # [n]: of |q| >= n
        rare = np.flatnonzero(tail[: CENTER + 1] * _RARE <= tail[0])
        reach = min(int(rare[0]) if len(rare) else _FAR, _FAR)
        inside[k] = q <= max(reach, 1)
    inside[:, ESCAPE] = False
    kept = np.where(inside, counts, 0)
    kept[:, ESCAPE] = counts.sum(axis=1) - kept.sum(axis=1)
    floor = inside.copy()
    floor[:, ESCAPE] = True
    return normalize(kept, BITS, floor)


@lru_cache(1)
def standard() -> Codebook:
    """The 64 tables that need no calibration."""
    return Codebook.of(fitted(shapes()))


@lru_cache(1)
def shapes() -> npt.NDArray[np.int64]:
    """Counts [64, SYMBOLS] of what those tables are made for."""
    rows = []
    for square in (True, False):
        for i in range(WIDTHS):
            width = _EXACT.multiply(_power(i), Decimal("0.1"))
            rows.append(_shape(width, square))
    made = np.array(rows, np.int64)
    made.flags.writeable = False
    return made


def _power(i: int) -> Decimal:
    """2^(0.3 i)."""
    return _EXACT.power(Decimal(2), _EXACT.multiply(Decimal("0.3"), Decimal(i)))


def _shape(width: Decimal, square: bool) -> list[int]:
    """Counts of symbols for a Gaussian, or a Laplacian, of this standard deviation in steps: the
    density at points spread evenly over each step."""
    points = 16 if width < 2 else 4
    half = [0] * CENTER
    for q in range(CENTER):
        for j in range(points):
            x = _EXACT.divide(Decimal(2 * (q * points + j) + 1 - points), Decimal(2 * points))
            z = _EXACT.divide(x.copy_abs(), width)
            power = _EXACT.multiply(z, z) if square else z
            power = _EXACT.multiply(power, _HALF if square else _ROOT)
            if power < -40:
                break
            half[q] += int(_EXACT.multiply(_EXACT.exp(power), _UNIT))
        if not half[q]:
            break
    return [0, *half[:0:-1], *half]
