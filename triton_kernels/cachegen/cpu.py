"""numba: the quantizer of `cachegen`: K turned back, means subtracted, steps per channel; and back.

CacheGen (Liu et al., arXiv 2310.07240) quantizes KV and entropy-codes it. Here K's rotary position
embedding is undone first (arXiv 2104.09864, in halves of a head apart: channel i goes with channel
i + half), so that its channels keep their means over all tokens; what is left around the means is
rounded half to even to steps: ``x ~ turn(q * step + mean)``.

Element bits, failures and rounding are those of `quantize_cpu.py`. `x` is bits [planes, tokens,
channels]; its first `first` tokens are left alone; its first `turned` planes are K that is turned;
`cos` and `sin` are float32 [tokens, half] (`turns`), for heads of `dim` channels of which the first
``2 * half`` are turned. Numbers q become symbols: q + 128, or 0, the *escape*, where the channel's
table does not reach so far: then q is in a list, with where it belongs.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from tierloom.triton_kernels.memory.floats import as_like, infinite, magnitude, to_bits, to_float
from tierloom.triton_kernels.memory.machine_code import compiled

CENTER = 128
"""The symbol of q = 0."""
ESCAPE = 0
ESCAPE_BITS = 64
"""What an escape takes in the list."""
SYMBOLS = 256
_F = np.float32
_MAGIC = _F(12582912.0)  # 1.5 * 2^23: adding it rounds half to even
_MOST = _F(32767)


def turns(start: int, tokens: int, freqs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 [tokens, half], of the rotation at positions from `start` on; `freqs`
    float32 [half], radians per token."""
    angles = np.arange(start, start + tokens, dtype=np.float64)[:, None] * freqs.astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@compiled(nogil=True)
def moments(x, first, turned, cos, sin, dim, means, spreads):
    """Means and mean square deviations over tokens, float64 [planes, channels], of turned-back x.
    False where a number is not finite."""
    planes, tokens, channels = x.shape
    y = np.empty(channels, np.float32)
    origin = np.empty(channels, np.float32)
    count = max(tokens - first, 1)
    for p in range(planes):
        total, square = means[p], spreads[p]
        total[:] = 0
        square[:] = 0
        for t in range(first, tokens):
            if not _load(x[p, t], y):
                return False
            if p < turned:
                _turn_back(y, cos[t], sin[t], dim)
            if t == first:
                origin[:] = y
            for c in range(channels):
                d = np.float64(y[c]) - np.float64(origin[c])
                total[c] += d
                square[c] += d * d
        for c in range(channels):
            mean = total[c] / count
            square[c] = max(square[c] / count - mean * mean, 0.0)
            total[c] = mean + np.float64(origin[c])
    return True


@compiled(nogil=True)
def quantize(x, first, turned, cos, sin, dim, means, steps, q):
    """q int16 [planes, tokens - first, channels] for means and steps float32 [planes, channels],
    where a step of 0 makes 0. False where a number is not finite or is too many steps off."""
    planes, tokens, channels = x.shape
    y = np.empty(channels, np.float32)
    inverse = np.empty(channels, np.float32)
    for p in range(planes):
        mean = means[p]
        for c in range(channels):
            inverse[c] = _F(1) / steps[p, c] if steps[p, c] > _F(0) else _F(0)
        for t in range(first, tokens):
            if not _load(x[p, t], y):
                return False
            if p < turned:
                _turn_back(y, cos[t], sin[t], dim)
            out = q[p, t - first]
            worst = _F(0)
            for c in range(channels):
                r = (y[c] - mean[c]) * inverse[c]
                worst = max(worst, abs(r))
                r = (min(max(r, -_MOST), _MOST) + _MAGIC) - _MAGIC
                out[c] = np.int16(np.int32(r))
            if not worst < _MOST:
                return False
    return True


@compiled(nogil=True)
def choose_tables(q, costs, tabid):
    """The cheapest table of each plane and channel, the first of equals: `tabid` uint8 [planes,
    channels]. costs int32 [tables, SYMBOLS]: of each symbol, 1/256 bit; of the escape, with its
    entry in the list."""
    planes, tokens, channels = q.shape
    counts = np.empty((channels, SYMBOLS), np.int32)
    for p in range(planes):
        counts[:] = 0
        for t in range(tokens):
            row = q[p, t]
            for c in range(channels):
                s = np.int32(row[c]) + np.int32(CENTER)
                counts[c, min(max(s, np.int32(0)), np.int32(SYMBOLS - 1))] += 1
        for c in range(channels):
            low, high = 0, SYMBOLS
            while low < SYMBOLS - 1 and counts[c, low] == 0:
                low += 1
            while high > low + 1 and counts[c, high - 1] == 0:
                high -= 1
            best, least = 0, np.int64(1) << 62
            for k in range(costs.shape[0]):
                total = np.int64(0)
                for i in range(low, high):
                    total += np.int64(counts[c, i]) * np.int64(costs[k, i])
                if total < least:
                    best, least = k, total
            tabid[p, c] = best


@compiled(nogil=True)
def to_symbols(q, reach, tabid, symbols, places, values):
    """symbols uint8 like q. What is further off than `reach` int32 [tables] of the channel's table
    becomes an escape: its index in q goes to `places` uint32, q to `values` int32. Returns how many
    there are, of which those that have no room are not written."""
    planes, tokens, channels = q.shape
    limit = np.empty(channels, np.int32)
    found = np.int64(0)
    for p in range(planes):
        for c in range(channels):
            limit[c] = reach[tabid[p, c]]
        for t in range(tokens):
            row, out = q[p, t], symbols[p, t]
            far = np.int32(0)
            for c in range(channels):
                n = np.int32(row[c])
                over = np.int32(abs(n) > limit[c])
                far += over
                out[c] = np.uint8((n + np.int32(CENTER)) * (np.int32(1) - over))
            if far == 0:
                continue
            for c in range(channels):
                if abs(np.int32(row[c])) > limit[c]:
                    if found < len(places):
                        places[found] = np.uint32((p * tokens + t) * channels + c)
                        values[found] = row[c]
                    found += 1
    return found


@compiled(nogil=True)
def dequantize(symbols, first, turned, cos, sin, dim, means, steps, places, values, x):
    """The inverse of `quantize` and `to_symbols`; fills `x` from token `first` on. Returns how many
    escapes of the list found their places: all of them, if the places are in order."""
    planes, tokens, channels = symbols.shape
    y = np.empty(channels, np.float32)
    used = np.int64(0)
    row_at = np.int64(0)
    for p in range(planes):
        mean, step = means[p], steps[p]
        for t in range(tokens):
            row = symbols[p, t]
            for c in range(channels):
                y[c] = _F(np.int32(row[c]) - np.int32(CENTER)) * step[c] + mean[c]
            while used < len(places):
                at = np.int64(places[used]) - row_at
                if at < 0 or at >= channels:
                    break
                y[at] = _F(values[used]) * step[at] + mean[at]
                used += 1
            row_at += channels
            if p < turned:
                _turn(y, cos[first + t], sin[first + t], dim)
            out = x[p, first + t]
            for c in range(channels):
                out[c] = to_bits(y[c], out[c])
    return used


@compiled(nogil=True)
def centered(x, first, turned, cos, sin, dim, means, y):
    """`y` float32 [planes, tokens - first, channels] becomes turned-back x around its means, for a
    transform that no kernel applies. False where a number is not finite."""
    planes, tokens, channels = x.shape
    for p in range(planes):
        for t in range(first, tokens):
            row = y[p, t - first]
            if not _load(x[p, t], row):
                return False
            if p < turned:
                _turn_back(row, cos[t], sin[t], dim)
            for c in range(channels):
                row[c] -= means[p, c]
    return True


@compiled(nogil=True)
def uncentered(y, first, turned, cos, sin, dim, means, x):
    """The inverse of `centered`: fills `x` from token `first` on; `y` is overwritten."""
    planes, tokens, channels = y.shape
    for p in range(planes):
        for t in range(tokens):
            row, out = y[p, t], x[p, first + t]
            for c in range(channels):
                row[c] += means[p, c]
            if p < turned:
                _turn(row, cos[first + t], sin[first + t], dim)
            for c in range(channels):
                out[c] = to_bits(row[c], out[c])


@compiled(nogil=True)
def quantize_tokens(x, most, tops, q):
    """CacheGen's own rule: ``x ~ q / most * top``, where `top` is the largest |x| of a token.

    x bits [planes, tokens, channels]; `most` int32 [planes], the largest q; `tops` bits like x
    [planes, tokens] and q int16 like x are filled. False where a number is not finite."""
    planes, tokens, channels = x.shape
    for p in range(planes):
        limit = _F(most[p])
        for t in range(tokens):
            row, out = x[p, t], q[p, t]
            top = magnitude(row[0])
            for c in range(channels):
                top = max(top, magnitude(row[c]))
            top = as_like(top, row[0])
            if infinite(top):
                return False
            tops[p, t] = top
            scale = to_float(top)
            scale = scale if scale > _F(0) else _F(1)
            for c in range(channels):
                r = (to_float(row[c]) / scale * limit + _MAGIC) - _MAGIC
                out[c] = np.int16(np.int32(r))
    return True


@compiled(nogil=True)
def dequantize_tokens(symbols, centers, most, tops, places, values, x):
    """The inverse of `quantize_tokens` and `to_symbols`, between which `centers` int8 [planes,
    channels] were taken from q; fills `x`. Returns what `dequantize` does; -1 where a top is not
    finite."""
    planes, tokens, channels = symbols.shape
    y = np.empty(channels, np.float32)
    used = np.int64(0)
    row_at = np.int64(0)
    for p in range(planes):
        limit = _F(most[p])
        for t in range(tokens):
            if infinite(magnitude(tops[p, t])):
                return np.int64(-1)
            row, top = symbols[p, t], to_float(tops[p, t])
            for c in range(channels):
                q = np.int32(row[c]) - np.int32(CENTER) + np.int32(centers[p, c])
                y[c] = _F(q) / limit * top
            while used < len(places):
                at = np.int64(places[used]) - row_at
                if at < 0 or at >= channels:
                    break
                y[at] = _F(values[used] + centers[p, at]) / limit * top
                used += 1
            row_at += channels
            out = x[p, t]
            for c in range(channels):
                out[c] = to_bits(y[c], out[c])
    return used


@njit(nogil=True)
def _load(row, y):
    """`y` float32 becomes the row; False where a number is not finite."""
    top = magnitude(row[0])
    for c in range(len(y)):
        top = max(top, magnitude(row[c]))
        y[c] = to_float(row[c])
    return not infinite(as_like(top, row[0]))


@njit(nogil=True)
def _turn_back(y, cos, sin, dim):
    half = len(cos)
    for at in range(0, len(y), dim):
        a, b = y[at : at + half], y[at + half : at + 2 * half]
        for i in range(half):
            u, v = a[i], b[i]
            a[i] = u * cos[i] + v * sin[i]
            b[i] = v * cos[i] - u * sin[i]


@njit(nogil=True)
def _turn(y, cos, sin, dim):
    half = len(cos)
    for at in range(0, len(y), dim):
        a, b = y[at : at + half], y[at + half : at + 2 * half]
        for i in range(half):
            u, v = a[i], b[i]
            a[i] = u * cos[i] - v * sin[i]
            b[i] = v * cos[i] + u * sin[i]
