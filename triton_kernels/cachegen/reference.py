"""NumPy: what `cachegen_cpu` means, operation by operation in float32, of elements as float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


def quantize_reference(
    x: Floats, first: int, turned: int, cos: Floats, sin: Floats, dim: int,
    means: Floats, steps: Floats,
) -> npt.NDArray[np.int16]:  # fmt: skip
    """q [planes, tokens - first, channels] of x [planes, tokens, channels]."""
    y = x.copy()
    y[:turned] = _turn(y[:turned], cos, -sin, dim)
    inverse = np.divide(np.float32(1), steps, where=steps > 0, out=np.zeros_like(steps))
    r = (y[:, first:] - means[:, None]) * inverse[:, None]
    q: npt.NDArray[np.int16] = np.rint(r).astype(np.int16)
    return q


def symbols_reference(
    q: npt.NDArray[np.int16], reach: npt.NDArray[np.int32], tabid: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
    """Symbols, and places and values of the escapes."""
    far = np.abs(q.astype(np.int32)) > reach[tabid][:, None]
    places = np.flatnonzero(far).astype(np.uint32)
    return np.where(far, 0, q + 128).astype(np.uint8), places, q[far].astype(np.int32)


def dequantize_reference(
    q: npt.NDArray[np.int32], first: int, turned: int, cos: Floats, sin: Floats, dim: int,
    means: Floats, steps: Floats,
) -> Floats:  # fmt: skip
    """x [planes, tokens - first, channels] of q, before it is rounded to its dtype."""
    y: Floats = q.astype(np.float32) * steps[:, None] + means[:, None]
    y[:turned] = _turn(y[:turned], cos[first:], sin[first:], dim)
    return y


def quantize_tokens_reference(
    x: Floats, most: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int16], Floats]:
    """q like x [planes, tokens, channels], and the largest |x| of each token."""
    tops = np.abs(x).max(axis=2)
    scale = np.where(tops > 0, tops, np.float32(1))[..., None]
    limit = most.astype(np.float32)[:, None, None]
    q: npt.NDArray[np.int16] = np.rint(x / scale * limit).astype(np.int16)
    return q, tops


def dequantize_tokens_reference(
    q: npt.NDArray[np.int32], most: npt.NDArray[np.int32], tops: Floats
) -> Floats:
    """x like q, before it is rounded to its dtype."""
    limit = most.astype(np.float32)[:, None, None]
    y: Floats = q.astype(np.float32) / limit * tops[..., None]
    return y


def _turn(y: Floats, cos: Floats, sin: Floats, dim: int) -> Floats:
    planes, tokens, channels = y.shape
    half = cos.shape[1]
    heads = y.reshape(planes, tokens, channels // dim, dim).copy()
    a, b = heads[..., :half].copy(), heads[..., half : 2 * half].copy()
    c, s = cos[:, None], sin[:, None]
    heads[..., :half] = a * c - b * s
    heads[..., half : 2 * half] = b * c + a * s
    return heads.reshape(planes, tokens, channels)
