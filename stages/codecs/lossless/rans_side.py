"""What a `rans` frame tells beside its streams: which symbols there are, and how frequent.

Frequencies are integers that add up to 2^bits, made of levels by integer arithmetic, so that both
sides have the same. A level is a weight with two bits after its first: steps of 14 to 25 %, whose
error costs less than 0.002 bits a symbol, and 6 bits where a frequency would take 11.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_WEIGHTS = np.array([(4 + level % 4) << (level // 4) for level in range(64)], np.int64)
LEVEL_BITS = 6
_ENOUGH_ROWS = 64
"""With this many tokens, channels can tell their tables."""
_WIDEST = 2048
"""Channels of a token that are looked for: more take time."""
_WORTH = 0.02
"""Bits an element that wider rows must save: less is chance, and more columns take time."""


def alphabet(known: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint16]:
    """The tops that have symbols, in the order of the numbers they begin: symbol i is the i-th.
    ``known`` [tops], the upper half of which are negative."""
    half = len(known) // 2
    negative, positive = np.flatnonzero(known[half:]) + half, np.flatnonzero(known[:half])
    return np.concatenate((negative[::-1], positive)).astype(np.uint16)


def levels_of(tables: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Levels of the counts that are not 0, row by row; of ``tables`` [K, NS]."""
    bounds = np.sqrt(_WEIGHTS[:-1] * _WEIGHTS[1:].astype(np.float64))
    most = np.maximum(tables.max(axis=1, keepdims=True), 1)
    found = np.searchsorted(bounds, tables * (float(_WEIGHTS[-1]) / most)).astype(np.uint8)
    counted: npt.NDArray[np.uint8] = found[tables > 0]
    return counted


def freq_of(
    present: npt.NDArray[np.bool_], levels: npt.NDArray[np.uint8], bits: int
) -> npt.NDArray[np.int64]:
    """Frequencies [K, NS], each row adding up to 2^bits; ``levels`` of those that are present.

    Each is rounded and at least 1; what is then left over or missing, the most frequent one bears.
    A row without any symbol codes symbol 0 alone. Raises ValueError where that is not enough.
    """
    weights = np.zeros(present.shape, np.int64)
    weights[present] = _WEIGHTS[levels]
    weights[:, 0] += ~present.any(axis=1)
    total = weights.sum(axis=1, keepdims=True)
    freq: npt.NDArray[np.int64] = np.maximum((weights << bits) + total // 2, total) // total
    freq[weights == 0] = 0
    rows, first = np.arange(len(freq)), freq.argmax(axis=1)
    freq[rows, first] += (1 << bits) - freq.sum(axis=1)
    if (freq[rows, first] < 1).any():
        raise ValueError(f"levels that do not fit into 2^{bits}")
    return freq


def columns_of(plane: npt.NDArray[np.uint8], tokens: int, channels: int) -> int:
    """Into how many columns a plane's elements are cut, given the symbols of one, [elements].

    Channels, if there are tokens enough to tell them apart. Else, and where rows are opaque blocks
    that have the channels somewhere inside, the divisor of `channels` whose columns explain most
    of the symbols' variance, less the bits that choosing their tables costs.
    """
    if tokens >= _ENOUGH_ROWS:
        return channels
    n = len(plane)
    x = plane.astype(np.float32) - np.float32(plane.mean())
    spread = float(np.square(x).mean()) or 1.0
    best, most = channels, -np.inf
    for width in [w for w in range(8, min(channels, _WIDEST) + 1) if channels % w == 0]:
        if width >= n:
            break
        within = spread - float(np.square(x.reshape(-1, width).mean(axis=0)).mean())
        share = within / spread * (n - 1) / (n - width)
        score = -0.5 * np.log2(min(max(share, 1e-3), 1.0)) - 5 * width / n
        if score > most + _WORTH:
            best, most = width, score
    return best


def room_for(values: int, bits: int) -> int:
    """Bytes of `count` values of `bits` bits, side by side."""
    return -(-values * bits // 8)


def packed_bits(values: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Values [n] below 2^bits, at most 8, side by side, low bits first."""
    flat = values.astype(np.uint8).reshape(-1, 1)
    return np.packbits(
        np.unpackbits(flat, axis=1, count=bits, bitorder="little"), bitorder="little"
    )


def unpacked_bits(data: npt.NDArray[np.uint8], values: int, bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of `packed`."""
    if not bits:
        return np.zeros(values, np.uint8)
    flat = np.unpackbits(data, count=values * bits, bitorder="little").reshape(values, bits)
    return np.packbits(flat, axis=1, bitorder="little")[:, 0]
