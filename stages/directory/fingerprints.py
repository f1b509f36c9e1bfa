"""Fingerprints of tokens, and the table that finds them again; numba, no GIL.

A fingerprint is the polynomial of `grain` tokens modulo the Mersenne prime 2^61 - 1 at a secret
base (Karp and Rabin, "Efficient randomized pattern-matching algorithms", 1987), mixed with a salt.

The table is open addressing with linear probing, uint64 an entry: the upper 39 bits of a
fingerprint, then 25 bits of identity + 1; 0 is empty. Its place is in proportion to the entry, and
entries lie in rising order (Amble and Knuth, "Ordered hash tables", 1974): a search that finds
nothing ends early, growing is one pass from end to end, and of what is removed no trace is left.
A large table grows in slices: until the larger one is whole, every change is made in the table that
is asked, and once more in the larger one where that has been filled already.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tierloom.triton_kernels.memory.machine_code import compiled

_U = np.uint64
_PRIME = np.uint64((1 << 61) - 1)
_BITS = np.uint64(25)
_HALF = np.uint64(32)
MOST = (1 << 25) - 2
"""Identities at most."""
SAME = 4
"""Grains of one text that the table keeps at most: a fifth replaces the oldest."""


@compiled(nogil=True)
def _times(a: Any, b: Any) -> Any:
    """a * b modulo the prime; both are below it."""
    high_a, low_a = a >> _U(31), a & _U(0x7FFFFFFF)
    high_b, low_b = b >> _U(31), b & _U(0x7FFFFFFF)
    middle = low_a * high_b + high_a * low_b
    r = ((high_a * high_b) << _U(1)) + (middle >> _U(30))
    r += ((middle & _U(0x3FFFFFFF)) << _U(31)) + low_a * low_b
    r = (r & _PRIME) + (r >> _U(61))
    return r - _PRIME if r >= _PRIME else r


@compiled(nogil=True)
def mixed(x: Any) -> Any:
    """A bijection of uint64 whose every bit depends on all of `x`."""
    for _ in range(2):
        x ^= x >> _HALF
        x *= _U(0xD6E8FEB86659FD93)
    return x ^ (x >> _HALF)


@compiled(nogil=True)
def windows(tokens: Any, grain: int, step: int, base: Any, salt: Any) -> Any:
    """uint64 [1 + (n - grain) // step]: fingerprints of tokens [i, i + grain) for every i that
    `step` divides. tokens: int32 [n], n >= grain."""
    n = len(tokens)
    out = np.empty(1 + (n - grain) // step, np.uint64)
    top = _U(1)
    for _ in range(grain):
        top = _times(top, base)
    top = _PRIME - top
    h = _U(0)
    for i in range(n):
        h = _times(h, base) + _U(np.uint32(tokens[i])) + _U(1)
        h = h - _PRIME if h >= _PRIME else h
        if i >= grain:
            h += _times(top, _U(np.uint32(tokens[i - grain])) + _U(1))
            h = h - _PRIME if h >= _PRIME else h
        start = i - grain + 1
        if start >= 0 and start % step == 0:
            out[start // step] = mixed(h ^ salt)
    return out


@compiled(nogil=True)
def home_of(entry: Any, size: Any) -> Any:
    """The slot where the search for an entry, or for a fingerprint, begins."""
    return np.int64(((entry >> _HALF) * size) >> _HALF)


@compiled(nogil=True)
def place_of(table: Any, size: Any, fingerprint: Any) -> Any:
    """The slot of the first entry that is not below a fingerprint, or of the empty one there."""
    tag = fingerprint >> _BITS
    s = home_of(fingerprint, size)
    while table[s] != 0 and table[s] >> _BITS < tag:
        s += 1
    return s


@compiled(nogil=True)
def insert(
    table: Any, size: Any, fingerprints: Any, first: int, per: int, ages: Any, filled: Any
) -> Any:
    """Give identities `first`, `first` + 1, ... to fingerprints. The last one of each `per` is a
    chunk's key, of which as many are kept as there are. ages: uint32 [chunks], a chunk's number
    when it came. filled: the size of the smaller table, and the slot of it up to which entries are
    in this one; what belongs behind is passed over. Returns entries that were added. The table's
    last slots must be empty."""
    added = 0
    now = ages[first // per]
    for k in range(len(fingerprints)):
        tag, ident = fingerprints[k] >> _BITS, first + k
        if home_of(fingerprints[k], filled[0]) >= filled[1]:
            continue
        start = s = place_of(table, size, fingerprints[k])
        same, oldest, age = 0, s, np.uint32(0)
        while ident % per != per - 1 and table[s] != 0 and table[s] >> _BITS == tag:
            other = np.int64(table[s] & _U(MOST + 1)) - 1
            if other % per != per - 1:
                if same == 0 or np.uint32(now - ages[other // per]) > age:
                    oldest, age = s, np.uint32(now - ages[other // per])
                same += 1
            s += 1
        entry = (tag << _BITS) | _U(ident + 1)
        if same >= SAME:
            table[oldest] = entry
            continue
        s = start
        while entry != 0:
            table[s], entry = entry, table[s]
            s += 1
        added += 1
    return added


@compiled(nogil=True)
def erase(table: Any, size: Any, tops: Any, first: int, count: int, filled: Any) -> Any:
    """Take identities [first, first + count) out; what lies after an entry moves back. tops: uint32
    by identity, the upper half of its fingerprint. `filled` as in `insert`. Returns entries that
    were removed."""
    removed = 0
    for ident in range(first, first + count):
        top = _U(tops[ident])
        if home_of(top << _HALF, filled[0]) >= filled[1]:
            continue
        s = home_of(top << _HALF, size)
        while table[s] != 0 and table[s] >> _HALF <= top:
            if np.int64(table[s] & _U(MOST + 1)) - 1 == ident:
                while table[s + 1] != 0 and home_of(table[s + 1], size) <= s:
                    table[s] = table[s + 1]
                    s += 1
                table[s] = 0
                removed += 1
                break
            s += 1
    return removed


@compiled(nogil=True)
def move_entries(old: Any, old_size: Any, new: Any, size: Any, begin: int, slots: int) -> Any:
    """Copy entries from slot `begin` on, `slots` of them and to the next empty one, into a larger
    table. Returns where to go on: what belongs before it is all there. Entries that were pushed
    beyond `begin` since the last slice are there already."""
    s, t = begin, 0
    while s < len(old) and (s < begin + slots or old[s] != 0):
        entry = old[s]
        if entry != 0 and home_of(entry, old_size) >= begin:
            t = max(t, home_of(entry, size))
            while new[t] != 0:
                t += 1
            new[t] = entry
        s += 1
    return s


@compiled(nogil=True)
def holders(table: Any, size: Any, fingerprint: Any, per: int) -> Any:
    """Chunks (int64) whose key has this fingerprint; as good as always none or one."""
    s, tag = place_of(table, size, fingerprint), fingerprint >> _BITS
    found = [np.int64(x) for x in range(0)]
    while table[s] != 0 and table[s] >> _BITS == tag:
        ident = np.int64(table[s] & _U(MOST + 1)) - 1
        if ident % per == per - 1:
            found.append(ident // per)
        s += 1
    return found
