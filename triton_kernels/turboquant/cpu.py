"""numba: TurboQuant, the scalar quantizer of vectors that were rotated at random.

Zandieh, Daliri, Hadian, Mirrokni, "TurboQuant: Online Vector Quantization with Near-optimal
Distortion Rate", arXiv 2504.19874: after a random rotation each coordinate of a unit vector is
close to N(0, 1/dim), whatever the vector was, so one codebook serves all. The rotation here is a
flip of signs and an orthonormal Walsh-Hadamard transform. What is stored beside the codes is the
factor that gives the decoded vector its length back.

Element bits, rounding and failures are those of `quantize_cpu.py`. Sums run in the order that
`hadamard.py` has on a GPU: halves onto halves.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from tierloom.triton_kernels.memory.floats import as_like, infinite, magnitude, to_bits, to_float
from tierloom.triton_kernels.memory.machine_code import compiled

LLOYD_MAX = {
    3: (0.245094179, 0.756005281, 1.343909279, 2.151945705),
    4: (
        0.12839503, 0.388048299, 0.656759119, 0.942340456,
        1.256231197, 1.618046386, 2.069017227, 2.732589571,
    ),
}  # fmt: skip
"""The best 2^bits levels for N(0, 1) (Max 1960), positive halves, rising."""
_F = np.float32
_LEAST = _F(1e-30)
"""Squared lengths below it are of zero vectors: their inverse would not be finite."""


def codebook(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels and the bounds between them, float32, of magnitudes."""
    levels = np.array(LLOYD_MAX[bits])
    return levels.astype(_F), ((levels[1:] + levels[:-1]) / 2).astype(_F)


@compiled(nogil=True)
def turboquant_encode(x, signs, levels, bounds, gains, codes):
    """x bits [planes, vectors, dim], dim a power of two from 8 on; signs float32 [planes, dim], 1
    or -1; gains float16 bits [planes, vectors]; codes uint8 [planes, vectors, dim * bits / 8].
    False where a length is not finite."""
    planes, vectors, dim = x.shape
    root = _F(math.sqrt(dim))
    v, w, s = np.empty(dim, _F), np.empty(dim, _F), np.empty(dim, _F)
    q = np.empty(dim, np.int32)
    for p in range(planes):
        sign = signs[p]
        for n in range(vectors):
            row = x[p, n]
            top = magnitude(row[0])
            for c in range(dim):
                top = max(top, magnitude(row[c]))
                v[c] = to_float(row[c]) * sign[c]
                s[c] = v[c] * v[c]
            square = _folded(s)
            if infinite(as_like(top, row[0])) or not square < _F(3e38):
                return False
            norm = np.sqrt(square)
            inverse = _F(1) / norm if square >= _LEAST else _F(0)
            _hadamard(v, w)
            _nearest(v, inverse, levels, bounds, q, s)
            gain = norm / (np.sqrt(_folded(s)) * root) if square >= _LEAST else _F(0)
            if gain > _F(65504):
                return False
            gains[p, n] = to_bits(gain, np.int16(0))
            if len(levels) == 8:
                _pack4(q, codes[p, n])
            else:
                _pack3(q, codes[p, n])
    return True


@compiled(nogil=True)
def turboquant_decode(codes, signs, levels, gains, x):
    """The inverse of `turboquant_encode`; fills `x`."""
    planes, vectors, dim = x.shape
    v, w = np.empty(dim, _F), np.empty(dim, _F)
    both = np.empty(2 * len(levels), _F)
    for i in range(len(levels)):
        both[i], both[len(levels) + i] = levels[i], -levels[i]
    for p in range(planes):
        sign = signs[p]
        for n in range(vectors):
            if len(levels) == 8:
                _unpack4(codes[p, n], both, v)
            else:
                _unpack3(codes[p, n], both, v)
            _hadamard(v, w)
            gain, out = to_float(gains[p, n]), x[p, n]
            for c in range(dim):
                out[c] = to_bits((v[c] * sign[c]) * gain, out[c])


@njit(nogil=True)
def _hadamard(v, w):
    """The Walsh-Hadamard transform of `v`, in place and not normalized; `w` is scratch."""
    half = len(v) // 2
    left = len(v)
    while left > 1:
        for i in range(half):
            a, b = v[i], v[i + half]
            w[2 * i], w[2 * i + 1] = a + b, a - b
        for i in range(len(v)):
            v[i] = w[i]
        left //= 2


@njit(nogil=True)
def _folded(s):
    """The sum of `s`, which is used up: the upper half onto the lower one, until one is left."""
    left = len(s) // 2
    while left:
        for i in range(left):
            s[i] += s[i + left]
        left //= 2
    return s[0]


@njit(nogil=True)
def _nearest(v, inverse, levels, bounds, q, s):
    """Codes of v * inverse: the level's index, and above it a bit for its sign; s: levels^2."""
    top = len(levels)
    for c in range(len(v)):
        q[c] = 0
    for k in range(len(bounds)):
        bound = bounds[k]
        for c in range(len(v)):
            q[c] += np.int32(abs(v[c] * inverse) > bound)
    for c in range(len(v)):
        s[c] = levels[q[c]] * levels[q[c]]
        q[c] += np.int32(top) * np.int32(v[c] < _F(0))


@njit(nogil=True)
def _pack4(q, out):
    """Channel i in the low half of byte i, i + dim / 2 in its high half."""
    half = len(out)
    for i in range(half):
        out[i] = np.uint8(q[i] | (q[i + half] << 4))


@njit(nogil=True)
def _unpack4(packed, levels, v):
    half = len(packed)
    for i in range(half):
        v[i], v[i + half] = levels[packed[i] & 15], levels[packed[i] >> 4]


@njit(nogil=True)
def _pack3(q, out):
    """Words of eight codes, those of channels i, i + dim / 8, ...; their first bytes, second, third
    bytes side by side."""
    words = len(q) // 8
    for i in range(words):
        word = np.int32(0)
        for j in range(8):
            word |= q[i + j * words] << (3 * j)
        out[i], out[i + words] = np.uint8(word), np.uint8(word >> 8)
        out[i + 2 * words] = np.uint8(word >> 16)


@njit(nogil=True)
def _unpack3(packed, levels, v):
    words = len(v) // 8
    for i in range(words):
        word = np.int32(packed[i]) | (np.int32(packed[i + words]) << 8)
        word |= np.int32(packed[i + 2 * words]) << 16
        for j in range(8):
            v[i + j * words] = levels[(word >> (3 * j)) & 7]
