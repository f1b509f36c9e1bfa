"""Static frequency tables for rANS: made of counts, checked, and packed for the coders.

A table gives each of NS symbols a frequency, integers that add up to 2^bits. It is written and
read with the same numbers or not at all, so everything here is integer arithmetic, with the same
result on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

BITS = (10, 11, 12)
UNCODABLE = 1 << 15
"""Set in the encoder's entry of a symbol that its table does not know."""

ENCODE_ROW = 256 + 8
"""Entries of a row of the encoder's table: no symbol, a byte, can lie outside; and a line of a
cache more, for rows that are a power of two apart would push one another out of it."""
_U32 = np.uint64(0xFFFFFFFF)
_HEAD_ROOM = 42
"""Bits of the largest count that is used exactly: with 20 more, int64 holds a priority."""


def normalize(
    counts: npt.NDArray[np.integer], bits: int, floor: npt.ArrayLike = 1
) -> npt.NDArray[np.uint16]:
    """Frequencies u16 [K, NS], each row adding up to 2^bits, in proportion to `counts` [K, NS].

    Each is at least `floor` (0 or 1, broadcast to `counts`): 1 lets a symbol be coded that was
    never counted, 0 leaves such a symbol out. A row of zeros becomes uniform over its floor.
    What rounding leaves over goes where it shortens the code most, by the divisor method of
    Webster and Sainte-Lague: to the largest count / (2 f + 1), the first of equals.

    Raises ValueError for counts that are negative or no integers, and for rows that cannot add
    up: more than 2^bits symbols, or none.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.dtype.kind not in "iu" or (counts.size and counts.min() < 0):
        raise ValueError(f"counts must be integers >= 0 [K, NS], not {counts.dtype} {counts.shape}")
    least = np.broadcast_to(np.asarray(floor, np.int64), counts.shape)
    if (least.sum(axis=1) > 1 << bits).any():
        raise ValueError(f"{counts.shape[1]} symbols do not fit into 2^{bits}")
    freq = np.empty(counts.shape, np.uint16)
    for k, row in enumerate(counts):
        freq[k] = _normalise_row(row, least[k], 1 << bits)
    return freq


def _normalise_row(
    row: npt.NDArray[np.integer], least: npt.NDArray[np.int64], total: int
) -> npt.NDArray[np.int64]:
    shift = max(0, int(row.max(initial=0)).bit_length() - _HEAD_ROOM)
    count = (row >> row.dtype.type(shift)).astype(np.int64)
    if not count.any():
        count = least.copy()
    if not count.any():
        raise ValueError("a table needs a symbol that was counted, or a floor of 1")
    freq = np.maximum(least, count * total // int(count.sum()))
    while int(freq.sum()) < total:
        freq[np.argmax((count << 20) // (2 * freq + 1))] += 1
    while int(freq.sum()) > total:
        cost = np.where(freq > least, (count << 20) // (2 * freq - 1), np.iinfo(np.int64).max)
        freq[np.argmin(cost)] -= 1
    return freq


@dataclass(frozen=True, slots=True)
class RansTables:
    """K checked tables over NS symbols, in the forms that the coders read; owns its arrays."""

    bits: int
    freq_cdf: npt.NDArray[np.uint32]
    """[K, NS] frequency | cumulated frequency << 16."""
    encode: npt.NDArray[np.uint64]
    """[K, ENCODE_ROW] the same, and 2^32 div f (at most 2^32 - 1) << 32, by which x is divided.

    A symbol without frequency, or beyond NS, is marked UNCODABLE and has frequency 2^bits: coding
    it changes nothing, so that an encoder may go on with it and look at the mark in the end.
    """
    decode: npt.NDArray[np.uint8]
    """[K, 2^bits] the symbol for x mod 2^bits."""

    @classmethod
    def of(cls, freq: npt.NDArray[np.integer], bits: int) -> RansTables:
        """Tables from frequencies [K, NS] of any integer type, which may come from anywhere.

        Raises ValueError unless K and NS are 1 to 256, `bits` is 10, 11 or 12, no frequency is
        negative, and each row adds up to 2^bits.
        """
        freq = np.asarray(freq)
        if bits not in BITS:
            raise ValueError(f"tables have 10, 11 or 12 bits, not {bits}")
        if (
            freq.ndim != 2
            or freq.dtype.kind not in "iu"
            or not all(0 < n < 257 for n in freq.shape)
        ):
            raise ValueError(f"frequencies must be integers [1..256, 1..256], not {freq.shape}")
        total = 1 << bits
        if (
            freq.min() < 0
            or freq.max() > total
            or (freq.sum(axis=1, dtype=np.int64) != total).any()
        ):
            raise ValueError(f"each row of frequencies must be >= 0 and add up to {total}")
        share = freq.astype(np.uint32)
        tables, symbols = share.shape
        below = np.cumsum(share, axis=1, dtype=np.uint32) - share
        freq_cdf = share | below << np.uint32(16)
        coded = np.where(share > 0, freq_cdf, np.uint32(UNCODABLE | total)).astype(np.uint64)
        inverse = np.minimum((1 << 32) // np.where(share > 0, share, total).astype(np.uint64), _U32)
        encode = np.full(
            (tables, ENCODE_ROW), UNCODABLE | total | (1 << 32) // total << 32, np.uint64
        )
        encode[:, :symbols] = coded | inverse << np.uint64(32)
        decode = [np.repeat(np.arange(symbols, dtype=np.uint8), row) for row in share]
        return cls(bits, freq_cdf, encode, np.stack(decode))

    def __len__(self) -> int:
        return len(self.freq_cdf)
