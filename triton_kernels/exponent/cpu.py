"""numba: 16-bit floats as symbols and raw bits, and back; the twin of `exponent.py`.

An element's *top* is its highest ``16 - shift`` bits: sign, exponent and one bit (bfloat16, shift
6) or two (float16, shift 8) of the mantissa, which is what an entropy coder shrinks. A table gives
the symbol of each top. What is left, the *rest*, is noise and is stored as it is:

    shift 8    u8 [n]       the low bytes
    shift 6    u8 [3, q]    q = 16 * ceil(n / 64): four bits-of-six in three bytes

With shift 6 the elements are cut into four runs a, b, c, d of q each (the last ones are shorter or
empty; what is missing counts as 0): byte i of row 0 is a[i] and bits 0 and 1 of d[i] above it, row
1 has b[i] and bits 2 and 3, row 2 has c[i] and bits 4 and 5. So whole vectors are moved everywhere.

Arrays are C-contiguous; nothing is allocated, nothing outside of them is touched, no GIL is held.
"""

from __future__ import annotations

import numpy as np

from tierloom.triton_kernels.memory.machine_code import compiled

SHIFTS = (6, 8)
_SIX, _TWO, _ONE = np.uint16(63), np.uint16(3), np.uint16(6)


def rest_bytes(n: int, shift: int) -> int:
    """Bytes of the rest of `n` elements."""
    return n if shift == 8 else 3 * run_of(n)


def run_of(n: int) -> int:
    """Elements of each of the four runs."""
    return -(-n // 64) * 16


@compiled(nogil=True)
def count_tops(x, shift, counts):
    """Add to ``counts`` int64 [2^(16 - shift)] how often each top occurs in x uint16 [n]."""
    # Neighbors are often equal: in one table each would wait for the last one's store.
    other = np.zeros((3, counts.shape[0]), np.int64)
    s = np.uint16(shift)
    quads = x.shape[0] // 4
    for i in range(quads):
        counts[x[4 * i] >> s] += 1
        other[0, x[4 * i + 1] >> s] += 1
        other[1, x[4 * i + 2] >> s] += 1
        other[2, x[4 * i + 3] >> s] += 1
    for i in range(4 * quads, x.shape[0]):
        counts[x[i] >> s] += 1
    for k in range(3):
        for t in range(counts.shape[0]):
            counts[t] += other[k, t]


@compiled(nogil=True)
def split(x, shift, symbol_of, symbols, rest):
    """x uint16 [n] to symbols uint8 [n] by ``symbol_of`` uint8 [2^(16 - shift)], and its rest
    uint8 [rest_bytes(n, shift)]."""
    n = x.shape[0]
    s = np.uint16(shift)
    for i in range(n):
        symbols[i] = symbol_of[x[i] >> s]
    if shift == 8:
        for i in range(n):
            rest[i] = np.uint8(x[i])
        return
    q = rest.shape[0] // 3
    for k in range(3):
        out = rest[k * q : (k + 1) * q]
        own = x[min(n, k * q) : min(n, (k + 1) * q)]
        last = x[min(n, 3 * q) : n]
        _pack(own, last, np.uint16(2 * k), out)


@compiled(nogil=True)
def merge(symbols, rest, shift, top_of, x):
    """The inverse of `split`; ``top_of`` uint16 [256] has the top of each symbol; fills `x`."""
    n = x.shape[0]
    s = np.uint16(shift)
    if shift == 8:
        for i in range(n):
            x[i] = np.uint16(top_of[symbols[i]] << s) | np.uint16(rest[i])
        return
    q = rest.shape[0] // 3
    a, b, c = rest[:q], rest[q : 2 * q], rest[2 * q :]
    for k in range(3):
        first, end = min(n, k * q), min(n, (k + 1) * q)
        _join(symbols[first:end], rest[k * q : (k + 1) * q], top_of, x[first:end])
    first = min(n, 3 * q)
    symbols, x = symbols[first:], x[first:]
    for i in range(x.shape[0]):
        high = (a[i] >> 6) | ((b[i] >> 6) << 2) | ((c[i] >> 6) << 4)
        x[i] = np.uint16(top_of[symbols[i]] << s) | np.uint16(high)


@compiled(nogil=True)
def _pack(own, last, by, out):
    """``out[i] = own[i] % 64 | (last[i] >> by) % 4 << 6``, where either may end early."""
    n, m = own.shape[0], last.shape[0]
    for i in range(m):
        out[i] = np.uint8((own[i] & _SIX) | (((last[i] >> by) & _TWO) << _ONE))
    for i in range(m, n):
        out[i] = np.uint8(own[i] & _SIX)
    out[n:] = 0


@compiled(nogil=True)
def _join(symbols, rest, top_of, x):
    for i in range(x.shape[0]):
        x[i] = np.uint16(top_of[symbols[i]] << _ONE) | (np.uint16(rest[i]) & _SIX)
