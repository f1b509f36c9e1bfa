"""Symbols with their tables, and arrays that notice whoever leaves them."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

import numpy as np
from paged_cases import POISON

from tierloom.triton_kernels.rans import reference as rans_reference
from tierloom.triton_kernels.rans.cpu import decode_streams, encode_streams
from tierloom.triton_kernels.rans.format import StreamGrid
from tierloom.triton_kernels.rans.tables import RansTables, normalize

NO_ACCESS = 0
"""PROT_NONE of mprotect(2), which the mmap module does not name."""
KINDS = ("likely", "equal", "rarest", "one")
"""Symbols drawn by their tables, all the same, each table's rarest, and tables of one symbol."""


def fenced(shape: tuple[int, ...], dtype: type, at: str = "end") -> np.ndarray:
    """A poisoned array in pages of its own, up against a page that kills whoever touches it.

    `at` says on which side: "start" or "end".
    """
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    page = mmap.PAGESIZE
    inner = max(page, -(-nbytes // page) * page)
    pages = mmap.mmap(-1, inner + 2 * page)
    raw = np.frombuffer(pages, np.uint8)
    raw[:] = POISON
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for fence in (raw.ctypes.data, raw.ctypes.data + page + inner):
        assert protect(ctypes.c_void_p(fence), ctypes.c_size_t(page), NO_ACCESS) == 0
    first = page if at == "start" else page + inner - nbytes
    return raw[first : first + nbytes].view(dtype).reshape(shape)


def poisoned(array: np.ndarray) -> bool:
    return bool((np.ascontiguousarray(array).view(np.uint8) == POISON).all())


@dataclass
class Streams:
    """What encoders write and decoders read, fenced."""

    words: np.ndarray
    counts: np.ndarray
    states: np.ndarray
    status: np.ndarray

    @classmethod
    def of(cls, grid: StreamGrid, words: int, at: str = "end") -> Streams:
        streams = (grid.planes, grid.groups)
        return cls(
            fenced((words,), np.uint16, at),
            fenced(streams, np.uint32, at),
            fenced((*streams, grid.lanes), np.uint32, at),
            fenced(streams, np.uint8, at),
        )

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.words, self.counts, self.states, self.status


@dataclass
class Case:
    grid: StreamGrid
    freq: np.ndarray
    tables: RansTables
    tabid: np.ndarray
    symbols: np.ndarray

    def encoded(self, words: int | None = None, at: str = "end") -> Streams:
        """By numba; `words` is the room, by default what always suffices."""
        room = self.grid.most_words(self.tables.bits) if words is None else words
        out = Streams.of(self.grid, room, at)
        total = encode_streams(self.grid, self.tables, self.symbols, self.tabid, *out.arrays())
        assert total == out.counts.sum()
        if words is None:
            assert poisoned(out.words[total:])
            kept = fenced((total,), np.uint16, at)
            kept[:] = out.words[:total]
            out.words = kept
        return out

    def decoded(self, streams: Streams, tabid: np.ndarray | None = None) -> np.ndarray:
        """By numba, into `streams.status` and fenced symbols."""
        symbols = fenced(self.symbols.shape, np.uint8)
        taken = (streams.words, streams.counts, streams.states)
        given = self.tabid if tabid is None else tabid
        decode_streams(self.grid, self.tables, *taken, given, symbols, streams.status)
        return symbols

    def reference(self) -> tuple[list[int], list[int], list[int]]:
        """Words, counts and states of all streams."""
        words: list[int] = []
        counts, states = [], []
        for plane in range(self.grid.planes):
            for group in range(self.grid.groups):
                mine, ends = rans_reference.encode_stream(
                    self.grid, self.freq, self.symbols, self.tabid, plane, group
                )
                words += mine
                counts.append(len(mine))
                states += ends
        return words, counts, states


def make_case(
    grid: StreamGrid, *, bits: int = 11, tables: int = 5, alphabet: int = 31,
    kind: str = "likely", seed: int = 0,
) -> Case:  # fmt: skip
    """Tables from nearly flat to extremely skewed, and symbols of a kind (see KINDS)."""
    rng = np.random.default_rng(seed)
    if kind == "one":
        alphabet = 1
    width = np.geomspace(alphabet, 0.3, tables)[:, None]
    away = np.abs(np.arange(alphabet) - alphabet // 2)
    freq = normalize((1e9 * np.exp(-away / width)).astype(np.int64), bits)
    tabid = rng.integers(0, tables, (grid.planes, grid.channels), dtype=np.uint8)
    shape = (grid.planes, grid.tokens, grid.channels)
    if kind == "likely":
        slot = rng.integers(0, 1 << bits, shape)
        tables_of = np.cumsum(freq, axis=1)[tabid][:, None]
        symbols = (slot[..., None] >= tables_of).sum(axis=-1)
    elif kind == "equal":
        symbols = np.full(shape, alphabet // 2)
    else:
        symbols = np.broadcast_to(freq.argmin(axis=1)[tabid][:, None], shape)
    symbols = np.ascontiguousarray(symbols, np.uint8)
    return Case(grid, freq, RansTables.of(freq, bits), tabid, symbols)
