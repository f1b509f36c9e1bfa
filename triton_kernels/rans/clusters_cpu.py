"""numba: which columns of a plane of symbols share a frequency table.

Channels differ in scale and offset, and so do their symbols. A table for each would cost more than
it saves, one for all saves little; so columns are clustered by Lloyd's rule with the bits that
coding takes as distance (entropy-constrained vector quantization, Chou, Lookabaugh and Gray 1989).
Only the encoder does this: tables and choices are stored, so the result need not be the same on
every machine, but it is the same for the same symbols on one.
"""

from __future__ import annotations

import numpy as np

from tierloom.triton_kernels.memory.machine_code import compiled

_ABSENT = np.float32(18)
"""Bits that a symbol costs which a table has not seen yet: more than it will."""

_NEAR = 8
"""Tables to each side of a column's own that it is tried with: the order of their means lasts."""


@compiled(nogil=True)
def count_columns(symbols, counts):
    """``counts`` uint16 [planes, columns, NS], zeroed before: of each symbol in each column of
    symbols uint8 [planes, rows, columns], whose rows are 65535 at most."""
    planes, rows, columns = symbols.shape
    for p in range(planes):
        flat, ns = counts[p].reshape(-1), np.uint64(counts.shape[2])
        for r in range(rows):
            row = symbols[p, r]
            for c in range(columns):
                flat[np.uint64(c) * ns + np.uint64(row[c])] += np.uint16(1)


@compiled(nogil=True)
def cluster(counts, turns, choice, tables):
    """Assign columns, counts uint16 [columns, NS], to K tables: ``choice`` uint8 [columns], and
    ``tables`` int64 [K, NS], the sums of the columns of each.

    Starts with columns in the order of their mean symbol, cut into K equal parts; then `turns`
    times, each goes where it costs least, the first of equals, among the tables near its own. A
    table may end up empty.
    """
    columns, ns = counts.shape
    many = tables.shape[0]
    mean = np.zeros(columns, np.float32)
    for c in range(columns):
        total, weight = np.int64(0), np.int64(0)
        for s in range(ns):
            total += np.int64(counts[c, s])
            weight += np.int64(counts[c, s]) * s
        mean[c] = np.float32(weight) / np.float32(total or 1)
    order = np.argsort(mean, kind="mergesort")
    for i in range(columns):
        choice[order[i]] = i * many // columns
    _sum(counts, choice, tables)
    price = np.empty((ns, many), np.float32)
    bits = np.empty(many, np.float32)
    for _ in range(turns):
        for k in range(many):
            whole = np.log2(np.float32(max(tables[k].sum(), 1)))
            for s in range(ns):
                n = tables[k, s]
                price[s, k] = whole - np.log2(np.float32(n)) if n else _ABSENT
        for c in range(columns):
            first = min(max(np.int64(choice[c]) - _NEAR, 0), max(many - 2 * _NEAR, 0))
            near = bits[: min(many, 2 * _NEAR)]
            near[:] = 0
            for s in range(ns):
                n = counts[c, s]
                if n:
                    times, row = np.float32(n), price[s, first:]
                    for k in range(near.shape[0]):
                        near[k] += times * row[k]
            choice[c] = first + np.argmin(near)
        _sum(counts, choice, tables)


@compiled(nogil=True)
def _sum(counts, choice, tables):
    tables[:] = 0
    for c in range(counts.shape[0]):
        row = tables[choice[c]]
        for s in range(counts.shape[1]):
            row[s] += np.int64(counts[c, s])
