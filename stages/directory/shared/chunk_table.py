"""Names of chunks to numbers, 20 bytes for each slot; numba, no GIL.

Open addressing with linear probing, whose removal leaves no trace (Knuth, The Art of Computer
Programming, vol. 3, 6.4, algorithm R). Names are digests, so they are their own hash. Nearly every
slot is a miss of all caches, and loads that wait for no branch come side by side: those of a search
are asked for before the first is looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tierloom.stages.directory.shared.records import NAME
from tierloom.triton_kernels.memory.machine_code import compiled

_NAMES = np.dtype([("low", "<u8"), ("high", "<u8")])
_SMALLEST = 1024


@compiled(nogil=True)
def _slot(rows: Any, values: Any, low: Any, high: Any) -> Any:
    """Where a name is, or the empty slot where it would be."""
    mask = len(values) - 1
    s = np.int64(low & np.uint64(mask))
    while values[s] != 0 and (rows[s, 0] != low or rows[s, 1] != high):
        s = (s + 1) & mask
    return s


@compiled(nogil=True)
def search(rows: Any, values: Any, names: Any, out: Any) -> Any:
    """Numbers of the longest prefix of names that are there, into `out`; returns its length. rows:
    uint64 [slots, 2], values: uint32 [slots], 0 is empty; names: `_NAMES`; out: uint32 [n]."""
    mask, seen = np.uint64(len(values) - 1), np.uint64(0)
    for i in range(len(names)):
        s = np.int64(names[i].low & mask)
        seen |= rows[s, 0] | np.uint64(values[s])
    out[0] = np.uint32(seen)  # or the compiler drops what nobody reads
    for i in range(len(names)):
        out[i] = values[_slot(rows, values, names[i].low, names[i].high)]
        if out[i] == 0:
            return i
    return len(names)


@compiled(nogil=True)
def insert_absent(rows: Any, values: Any, names: Any, new: Any, old: Any) -> Any:
    """Give numbers to names that have none, and to `old` those that had one; returns how many were
    added. new, old: uint32 [n]; a new one of 0 adds nothing."""
    added = 0
    for i in range(len(names)):
        s = _slot(rows, values, names[i].low, names[i].high)
        old[i] = values[s]
        if old[i] == 0 and new[i] != 0:
            rows[s, 0], rows[s, 1], values[s] = names[i].low, names[i].high, new[i]
            added += 1
    return added


@compiled(nogil=True)
def replace(rows: Any, values: Any, low: Any, high: Any, value: Any) -> None:
    """Give a name that is there another number; 0 removes it."""
    mask = len(values) - 1
    hole = _slot(rows, values, low, high)
    values[hole] = value
    t = hole
    while value == 0:
        t = (t + 1) & mask
        if values[t] == 0:
            break
        home = np.int64(rows[t, 0] & np.uint64(mask))
        if (t - home) & mask >= (t - hole) & mask:  # it may lie where the hole is
            rows[hole, 0], rows[hole, 1], values[hole] = rows[t, 0], rows[t, 1], values[t]
            values[t] = 0
            hole = t


@compiled(nogil=True)
def refill(rows: Any, values: Any, larger: Any, numbers: Any) -> None:
    """Put all of a table into an empty one."""
    for i in range(len(values)):
        if values[i] != 0:
            s = _slot(larger, numbers, rows[i, 0], rows[i, 1])
            larger[s, 0], larger[s, 1], numbers[s] = rows[i, 0], rows[i, 1], values[i]


class ChunkTable:
    """Not thread-safe. It doubles when 2/3 are full, at once: 0.1 s at 4 x 10^6 chunks."""

    def __init__(self) -> None:
        self._count = 0
        self._make(_SMALLEST)

    def __len__(self) -> int:
        return self._count

    def find(self, names: bytes) -> list[int]:
        """Numbers of the longest prefix that is there. `names`: one after another."""
        asked = np.frombuffer(names, _NAMES)
        out = np.empty(max(1, len(asked)), np.uint32)
        found: list[int] = out[: search(self._rows, self._values, asked, out)].tolist()
        return found

    def add(self, names: bytes, numbers: Any) -> Any:
        """Numbers that names have already, uint32 [n]; those that have none get theirs."""
        asked = np.frombuffer(names, _NAMES)
        if 3 * (self._count + len(asked)) > 2 * len(self._values):
            rows, values = self._rows, self._values
            self._make(2 * len(values))
            refill(rows, values, self._rows, self._values)
        old = np.empty(len(asked), np.uint32)
        self._count += insert_absent(self._rows, self._values, asked, numbers, old)
        return old

    def replace(self, name: bytes, number: int) -> None:
        """Another number for a name that is there; 0 removes it."""
        low, high = np.frombuffer(name, np.uint64)
        replace(self._rows, self._values, low, high, np.uint32(number))
        self._count -= not number

    def names(self, begin: int, end: int) -> list[bytes]:
        """Names in some slots. What others add and remove moves names, so that two calls may miss
        one."""
        raw = self._rows[begin:end][self._values[begin:end] != 0].tobytes()
        return [raw[i : i + NAME] for i in range(0, len(raw), NAME)]

    @property
    def slots(self) -> int:
        return len(self._values)

    @staticmethod
    def warm_up() -> None:
        """Compile what all tables use."""
        table, names = ChunkTable(), np.arange(2 * _SMALLEST, dtype=np.uint64).tobytes()
        table.add(names, np.ones(_SMALLEST, np.uint32))
        table.find(names[:NAME])
        table.replace(names[:NAME], 0)

    def _make(self, slots: int) -> None:
        self._rows = np.zeros((slots, 2), np.uint64)
        self._values = np.zeros(slots, np.uint32)
