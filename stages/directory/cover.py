"""Which kept chunks cover a prompt best; numba, no GIL."""

from __future__ import annotations

from typing import Any

import numpy as np

from tierloom.stages.directory.fingerprints import MOST, SAME, home_of, place_of
from tierloom.triton_kernels.memory.machine_code import compiled

_U = np.uint64
_BITS = np.uint64(25)
_HALF = np.uint64(32)
_AHEAD = 64

CHUNK = np.dtype(
    [
        ("age", np.uint32),
        ("parent", np.uint32),
        ("opening", np.uint32),
        ("position", np.int32),
        ("tokens", np.int32),
    ]
)
"""What is known of a chunk; `parent` and `opening` are short hashes of keys."""


@compiled(nogil=True)
def hits_of(fingerprints: Any, table: Any, size: Any, per: int, first: Any, ids: Any) -> Any:
    """Kept grains with the prompt's fingerprints, by offset: ids[first[p] : first[p + 1]] at p.
    first: int32 [n + 1], ids: int32 [4 n], both filled here. Returns their number.

    Nearly every place is a miss of all caches. Loads that wait for no branch come side by side, so
    a block's are asked for before the first of them is looked at.
    """
    n, m, seen = len(fingerprints), 0, _U(0)
    for p in range(n):
        if p % _AHEAD == 0:
            for q in range(p, min(n, p + _AHEAD)):
                seen |= table[home_of(fingerprints[q], size)]
            first[n] = seen & _U(1)  # or the compiler drops what nobody reads
        first[p] = m
        f = fingerprints[p]
        s, tag = place_of(table, size, f), f >> _BITS
        while table[s] != 0 and table[s] >> _BITS == tag and m < first[p] + SAME:
            ident = np.int64(table[s] & _U(MOST + 1)) - 1
            if ident % per != per - 1:
                ids[m] = ident
                m += 1
            s += 1
    first[len(fingerprints)] = m
    return m


@compiled(nogil=True)
def joins(ident: int, p: int, chunks: Any, per: int, wanted: Any) -> bool:
    """The grain at offset p goes on where the exact prefix ended; arguments as in `cover`."""
    _, grain, parent, start = wanted
    c = chunks[ident // per]
    follows = ident % per == 0 and c.parent == parent and c.position == start
    return bool(p == 0 and (ident == grain or follows))


@compiled(nogil=True)
def _rank(ident: int, p: int, worth: Any, chunks: Any, per: int, wanted: Any) -> Any:
    """Of two hits for the same text the one with the greater rank is taken. What began its prompt
    comes last: its first tokens are attended to whatever they say."""
    c = chunks[ident // per]
    return (
        np.int64(joins(ident, p, chunks, per, wanted)),
        np.int64(c.opening == wanted[0]),
        worth,
        np.int64(c.position + ident % per > 0),
    )


@compiled(nogil=True)
def cover(
    fingerprints: Any, first: Any, ids: Any, tops: Any, chunks: Any, shape: Any, wanted: Any
) -> Any:
    """int64 [k, 4]: offset, grains, identity of the first grain, 1 where a run begins.

    Of all ways to lay kept grains over the prompt, the one with most tokens, where each run costs
    one token less than `least`; found from the end, as each hit continues in one way. tops: uint32
    by identity. chunks: `CHUNK` by chunk. shape: identities of a chunk, grain, least. wanted: the
    prompt's opening (short hash), the grain and the short hash of the parent by which offset 0 goes
    on with what lies before it (each -1: none), and the position of offset 0.
    A hit is followed by fingerprints, so one of its grains that the table no longer has cuts no
    run.
    """
    per, grain, least = shape
    n, m = len(fingerprints), first[len(fingerprints)]
    length, after = np.empty(m, np.int32), np.empty(m, np.int32)
    own = np.empty(m, np.int64)  # tokens of the run from this hit on
    worth = np.empty(m, np.int64)  # the same, and of what comes after the run
    best, chosen = np.zeros(n + grain + 1, np.int64), np.empty(n, np.int32)
    for p in range(n - 1, -1, -1):
        most, pick = best[p + 1], -1
        for k in range(first[p], first[p + 1]):
            ident, q, after[k] = ids[k], p + grain, -1
            c = ident // per
            left = chunks[c].tokens // grain - ident % per - 1
            end = chunks[c].position + (chunks[c].tokens // grain) * grain
            while q < n and after[k] < 0:
                if left == 0:  # the chunk's end: the best of those that followed it
                    mine = tops[c * per + per - 1]
                    for j in range(first[q], first[q + 1]):
                        d = ids[j] // per
                        if ids[j] % per or chunks[d].parent != mine or chunks[d].position != end:
                            continue
                        if after[k] < 0 or worth[j] > worth[after[k]]:
                            after[k] = j
                    break
                ident += 1
                for j in range(first[q], first[q + 1]):
                    if ids[j] == ident:
                        after[k] = j
                if after[k] < 0:
                    if tops[ident] != np.uint32(fingerprints[q] >> _HALF):
                        break
                    q, left = q + grain, left - 1
            length[k] = (q - p) // grain
            go = best[q]
            if after[k] >= 0 and worth[after[k]] >= go:
                go = worth[after[k]]
            else:
                after[k] = -1
            worth[k] = q - p + go
            own[k] = q - p + (own[after[k]] if after[k] >= 0 else 0)
            if own[k] >= least and worth[k] - least + 1 > most:
                most, pick = worth[k] - least + 1, k
        if pick >= 0:
            best_rank, bar = _rank(ids[pick], p, worth[pick], chunks, per, wanted), worth[pick]
            for k in range(first[p], first[p + 1]):
                rank = _rank(ids[k], p, worth[k], chunks, per, wanted)
                slack = least - 1 if rank[0] + rank[1] > 0 else 0
                if own[k] < least or worth[k] + slack < bar or rank < best_rank:
                    continue
                newer = np.int32(chunks[ids[k] // per].age - chunks[ids[pick] // per].age) > 0
                if rank > best_rank or newer:
                    pick, best_rank = k, rank
            most = worth[pick] - least + 1
        best[p], chosen[p] = most, pick
    out = np.empty((m, 4), np.int64)
    rows = p = 0
    while p < n:
        k, new = chosen[p], 1
        if k < 0:
            p += 1
        while k >= 0:
            out[rows, 0], out[rows, 1], out[rows, 2], out[rows, 3] = p, length[k], ids[k], new
            rows, new, p, k = rows + 1, 0, p + length[k] * grain, after[k]
    return out[:rows]
