"""numba: KV elements to 8 and 4 bits and back, group by group; the twins of `quantize.py`.

Arrays of elements hold bits (uint16 bfloat16, int16 float16, uint32 float32; see `floats.py`) and
are C-contiguous. Nothing is allocated but a group's worth of scratch, nothing is written outside
the arrays given, no GIL is held. An encoder returns False where a number is not finite or a scale
would not be: what it has written is then of no use.

Each element is rounded half to even by a magic addition, which is exact below 2^22 and a vector
instruction everywhere; no fastmath, which would fold it away.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from tierloom.triton_kernels.memory.floats import (
    as_like,
    extremes,
    infinite,
    magnitude,
    to_bits,
    to_float,
)
from tierloom.triton_kernels.memory.machine_code import compiled

GROUP = 32
"""Channels of an int4 group."""
_F = np.float32
_MAGIC = _F(12582912.0)  # 1.5 * 2^23
_FP16_INFINITE = np.int16(0x7C00)
_LEAST_FP8 = _F(1e-30)
"""Groups without a greater number are zeros: the inverse of their scale would not be finite."""
INT4_RANGE = 15.25
"""Steps from a group's least number to its greatest: a little more than the 15 there are, since
half of the extremes' last step costs less than coarser steps for all."""
_SCALE_INFINITE = 0x7C0


@compiled(nogil=True)
def int8_encode(x, scales, codes):
    """Symmetric: ``x ~ codes * scales``. x bits [groups, G], scales float16 bits [groups], codes
    int8 [groups, G]."""
    if x.shape[0] == 0:
        return True
    kind = x[0, 0]
    for n in range(x.shape[0]):
        row, out = x[n], codes[n]
        top = _top(row)
        if infinite(top):
            return False
        scale = to_float(top) / _F(127)
        if scale > _F(65504):
            return False
        bits = to_bits(scale, np.int16(0))
        scales[n] = bits
        scale = to_float(bits)
        inverse = _F(1) / scale if scale > _F(0) else _F(0)
        for c in range(row.shape[0]):
            q = (to_float(as_like(row[c], kind)) * inverse + _MAGIC) - _MAGIC
            out[c] = np.int8(np.int32(min(max(q, _F(-127)), _F(127))))
    return True


@compiled(nogil=True)
def int8_decode(codes, scales, x):
    """The inverse of `int8_encode`; fills `x`."""
    for n in range(codes.shape[0]):
        row, out = codes[n], x[n]
        scale = to_float(scales[n])
        for c in range(row.shape[0]):
            out[c] = to_bits(_F(row[c]) * scale, out[c])


@compiled(nogil=True)
def fp8_encode(x, group, scales, codes):
    """e4m3fn, scaled so that the greatest of a head and `group` tokens becomes 448. x bits
    [planes, tokens, heads, dim], scales float32 [planes, ceil(tokens / group), heads], codes uint8
    like x."""
    planes, tokens, heads, dim = x.shape
    for p in range(planes):
        for g in range(scales.shape[1]):
            first, last = g * group, min((g + 1) * group, tokens)
            for h in range(heads):
                top = magnitude(x[p, first, h, 0])
                for t in range(first, last):
                    top = max(top, _top(x[p, t, h]))
                if infinite(top):
                    return False
                scale = to_float(top) / _F(448)
                if scale < _LEAST_FP8:
                    scale = _F(0)
                scales[p, g, h] = scale
                inverse = _F(1) / scale if scale > _F(0) else _F(0)
                for t in range(first, last):
                    row, out = x[p, t, h], codes[p, t, h]
                    for c in range(dim):
                        out[c] = to_bits(to_float(row[c]) * inverse, np.uint8(0))
    return True


@compiled(nogil=True)
def fp8_decode(codes, group, scales, x):
    """The inverse of `fp8_encode`; fills `x`."""
    planes, tokens, heads, dim = x.shape
    for p in range(planes):
        for t in range(tokens):
            for h in range(heads):
                scale = scales[p, t // group, h]
                row, out = codes[p, t, h], x[p, t, h]
                for c in range(dim):
                    out[c] = to_bits(to_float(row[c]) * scale, out[c])


@compiled(nogil=True)
def channel_means(x, first, means):
    """Means over the tokens from `first` on, as float16. x bits [planes, tokens, channels], means
    float16 bits [some planes, channels]. Sums run in float32, token by token."""
    tokens, channels = x.shape[1], x.shape[2]
    total = np.empty(channels, np.float32)
    for p in range(means.shape[0]):
        total[:] = 0
        for t in range(first, tokens):
            row = x[p, t]
            for c in range(channels):
                total[c] += to_float(row[c])
        for c in range(channels):
            mean = total[c] / _F(max(tokens - first, 1))
            if not abs(mean) <= _F(65504):
                return False
            means[p, c] = to_bits(mean, np.int16(0))
    return True


@compiled(nogil=True)
def int4_encode(x, first, means, steps, codes):
    """Asymmetric, in groups of 32 channels: ``x ~ (code - zero / 2) * scale + mean``.

    x bits [planes, tokens, channels], of which the tokens before `first` are left alone; means
    float16 bits [some planes, channels], of the first planes; steps uint16 [planes, tokens - first,
    groups]: 11 bits of a float16 scale, 5 of its zero point; codes uint8 [planes, tokens - first,
    groups, 16]: channel i in the low half of byte i, i + 16 in its high half. A last group that is
    short is filled up with zeros.
    """
    planes, tokens, channels = x.shape
    groups = steps.shape[2]
    y = np.zeros(groups * GROUP, np.float32)
    low, high = np.empty(groups, np.float32), np.empty(groups, np.float32)
    q = np.empty(GROUP, np.int32)
    center = np.zeros(channels, np.float32)
    for p in range(planes):
        _center(means, p, center)
        for t in range(tokens - first):
            row, step = x[p, first + t], steps[p, t]
            if infinite(_top(row)):
                return False
            for c in range(channels):
                y[c] = to_float(row[c]) - center[c]
            for g in range(groups):
                low[g], high[g] = extremes(y[g * GROUP : (g + 1) * GROUP])
            # Scales of a whole row at once: one after another, their divisions would take longer
            # than all else. `low` and `high` then hold what the quantizer needs of them.
            worst = np.int32(0)
            for g in range(groups):
                code = (
                    np.int32(to_bits((high[g] - low[g]) / _F(INT4_RANGE), np.int16(0))) + 15
                ) >> 4
                worst = max(worst, code)
                scale = to_float(np.int16(code << 4))
                inverse = _F(1) / scale if scale > _F(0) else _F(0)
                zero = min(((-low[g] * inverse) * _F(2) + _MAGIC) - _MAGIC, _F(31))
                step[g] = np.uint16(code << 5) | np.uint16(zero)
                low[g], high[g] = zero * _F(0.5), inverse
            if worst >= _SCALE_INFINITE:
                return False
            for g in range(groups):
                shift, inverse, part = low[g], high[g], y[g * GROUP : (g + 1) * GROUP]
                for c in range(GROUP):
                    r = ((part[c] * inverse + shift) + _MAGIC) - _MAGIC
                    q[c] = np.int32(min(max(r, _F(0)), _F(15)))
                out = codes[p, t, g]
                for c in range(GROUP // 2):
                    out[c] = np.uint8(q[c] | (q[c + GROUP // 2] << 4))
    return True


@compiled(nogil=True)
def int4_decode(codes, first, means, steps, x):
    """The inverse of `int4_encode`; fills `x` from token `first` on."""
    planes, tokens, channels = x.shape
    half = GROUP // 2
    center = np.zeros(channels, np.float32)
    y = np.empty(GROUP, np.float32)
    for p in range(planes):
        _center(means, p, center)
        for t in range(tokens - first):
            row = x[p, first + t]
            for g in range(steps.shape[2]):
                packed, step = codes[p, t, g], np.int32(steps[p, t, g])
                scale = to_float(np.int16((step >> 5) << 4))
                shift = _F(step & 31) * _F(0.5)
                for c in range(half):
                    byte = np.int32(packed[c])
                    y[c] = (_F(byte & 15) - shift) * scale
                    y[c + half] = (_F(byte >> 4) - shift) * scale
                at = g * GROUP
                if at + GROUP <= channels:
                    out, mid = row[at : at + GROUP], center[at : at + GROUP]
                    for c in range(GROUP):
                        out[c] = to_bits(y[c] + mid[c], out[c])
                else:
                    for c in range(channels - at):
                        row[at + c] = to_bits(y[c] + center[at + c], row[at + c])


@njit(nogil=True, inline="always")
def _top(row):
    """The greatest magnitude of a row, as bits."""
    top = magnitude(row[0])
    for c in range(row.shape[0]):
        top = max(top, magnitude(row[c]))
    return as_like(top, row[0])


@njit(nogil=True, inline="always")
def _center(means, p, center):
    for c in range(center.shape[0]):
        center[c] = to_float(means[p, c]) if p < means.shape[0] else _F(0)
