"""What the rANS coders must do, symbol by symbol in Python integers: the oracle of the tests.

See `rans_format` for the streams. Nothing here is packed, shifted or looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tierloom.triton_kernels.rans.format import INITIAL_STATE, StreamGrid

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def encode_stream(
    grid: StreamGrid,
    freq: npt.NDArray[np.integer],
    symbols: npt.NDArray[np.uint8],
    tabid: npt.NDArray[np.uint8],
    plane: int,
    group: int,
) -> tuple[list[int], list[int]]:
    """The words and the end states of one stream; `freq` is [K, NS]."""
    total = int(freq[0].sum())
    x = [INITIAL_STATE] * grid.lanes
    steps: list[list[int]] = []
    for token, places in reversed(list(_steps(grid, group))):
        words = []
        for lane, channel in places:
            table = [int(f) for f in freq[tabid[plane, channel]]]
            s = int(symbols[plane, token, channel])
            f, c = table[s], sum(table[:s])
            if x[lane] >= f * 2**32 // total:
                words.append(x[lane] % 2**16)
                x[lane] //= 2**16
            x[lane] = x[lane] // f * total + x[lane] % f + c
        steps.append(words)
    return [word for words in reversed(steps) for word in words], x


def decode_stream(
    grid: StreamGrid,
    freq: npt.NDArray[np.integer],
    words: list[int],
    states: list[int],
    tabid: npt.NDArray[np.uint8],
    plane: int,
    group: int,
    symbols: npt.NDArray[np.uint8],
) -> bool:
    """Fill the stream's symbols; whether it ended as it should."""
    total = int(freq[0].sum())
    x, at = list(states), 0
    for token, places in _steps(grid, group):
        for lane, channel in places:
            table = [int(f) for f in freq[tabid[plane, channel]]]
            slot = x[lane] % total
            s = c = 0
            while slot >= c + table[s]:
                c += table[s]
                s += 1
            symbols[plane, token, channel] = s
            x[lane] = table[s] * (x[lane] // total) + slot - c
            if x[lane] < INITIAL_STATE:
                if at == len(words):
                    return False
                x[lane] = x[lane] * 2**16 + words[at]
                at += 1
    return at == len(words) and x == [INITIAL_STATE] * grid.lanes


def _steps(grid: StreamGrid, group: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(token, [(lane, channel), ...]) of each step of a stream, in the decoder's order."""
    for token in range(grid.tokens):
        for r in range(grid.rounds):
            first = (group * grid.rounds + r) * grid.lanes
            live = range(min(grid.lanes, grid.channels - first))
            yield token, [(lane, first + lane) for lane in live]
