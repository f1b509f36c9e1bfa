"""What the quantizers must do, in plain torch: the oracle of the tests, and slow.

Elements are tensors of their own dtype here, on a CPU; codes and scales are as the kernels write
them. Numbers are taken to be finite, and scales to fit.
"""

from __future__ import annotations

import math

import torch


def int8_encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [groups, G] to (scales float16 [groups], codes int8 like x)."""
    scales = (x.float().abs().amax(1) / 127).half()
    inverse = _inverse(scales.float())
    return scales, torch.round(x.float() * inverse[:, None]).clamp(-127, 127).to(torch.int8)


def int8_decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return saturated(codes.float() * scales.float()[:, None], dtype)


def fp8_encode(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [planes, tokens, heads, dim] to (scales float32 [planes, groups, heads], codes
    float8_e4m3fn like x)."""
    parts = [part.float().abs().amax((1, 3)) for part in x.split(group, 1)]
    scales = torch.stack(parts, 1) / 448
    scales[scales < 1e-30] = 0
    inverse = _inverse(scales).repeat_interleave(group, 1)[:, : x.shape[1]]
    return scales, saturated(x.float() * inverse[..., None], torch.float8_e4m3fn)


def fp8_decode(
    codes: torch.Tensor, group: int, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    each = scales.repeat_interleave(group, 1)[:, : codes.shape[1]]
    return saturated(codes.float() * each[..., None], dtype)


def channel_means(x: torch.Tensor) -> torch.Tensor:
    """x [planes, tokens, channels] to float16 [planes, channels]; summed token by token."""
    total = torch.zeros(x.shape[0], x.shape[2])
    for token in x.float().unbind(1):
        total = total + token
    return (total / max(1, x.shape[1])).half()


def int4_encode(x: torch.Tensor, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [planes, tokens, channels], channels a multiple of 32; means float16 [some planes,
    channels]. To (steps int16 [planes, tokens, groups], codes uint8 [planes, tokens, groups,
    16])."""
    y = (x.float() - _center(x.shape, means)).unflatten(2, (-1, 32))
    low, high = y.amin(3).clamp(max=0), y.amax(3).clamp(min=0)
    code = (((high - low) / 15.25).half().view(torch.int16).int() + 15) >> 4
    inverse = _inverse((code << 4).to(torch.int16).view(torch.float16).float())
    zero = torch.round((-low * inverse) * 2).clamp(max=31)
    q = torch.round(y * inverse[..., None] + (zero * 0.5)[..., None]).clamp(0, 15).to(torch.uint8)
    return ((code << 5) | zero.int()).to(torch.int16), q[..., :16] | (q[..., 16:] << 4)


def int4_decode(
    codes: torch.Tensor, means: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Tokens of ``[planes, tokens, channels]``."""
    step = steps.int() & 0xFFFF
    scale = ((step >> 5) << 4).to(torch.int16).view(torch.float16).float()
    q = torch.cat([codes & 15, codes >> 4], -1).float()
    y = ((q - ((step & 31) * 0.5)[..., None]) * scale[..., None]).flatten(2)
    return saturated(y + _center(y.shape, means), dtype)


def hadamard(v: torch.Tensor) -> torch.Tensor:
    """The Walsh-Hadamard transform of the last axis, not normalized."""
    for _ in range(int(math.log2(v.shape[-1]))):
        a, b = v.chunk(2, -1)
        v = torch.stack([a + b, a - b], -1).flatten(-2)
    return v


def turboquant_encode(
    x: torch.Tensor, signs: torch.Tensor, levels: torch.Tensor, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [planes, vectors, dim], signs float32 [planes, dim] to (gains float16 [planes, vectors],
    codes int64 like x, not yet packed)."""
    v = x.float() * signs[:, None]
    norm = _folded(v * v).sqrt()
    inverse = torch.where(norm * norm > 1e-30, 1 / norm, 0)
    turned = hadamard(v)
    q = ((turned * inverse[..., None]).abs()[..., None] > bounds).sum(-1)
    gain = norm / (_folded(levels[q] * levels[q]).sqrt() * torch.tensor(math.sqrt(x.shape[-1])))
    return torch.where(inverse > 0, gain, 0).half(), q + len(levels) * (turned < 0)


def turboquant_decode(
    codes: torch.Tensor,
    signs: torch.Tensor,
    levels: torch.Tensor,
    gains: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    both = torch.cat([levels, -levels])
    v = hadamard(both[codes]) * signs[:, None]
    return saturated(v * gains.float()[..., None], dtype)


def saturated(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    most = torch.finfo(dtype).max
    return y.clamp(-most, most).to(dtype)


def _folded(s: torch.Tensor) -> torch.Tensor:
    """Sums of the last axis: the upper half onto the lower one, until one is left."""
    while s.shape[-1] > 1:
        a, b = s.chunk(2, -1)
        s = a + b
    return s[..., 0]


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, 1 / scale, 0)


def _center(shape: torch.Size, means: torch.Tensor) -> torch.Tensor:
    center = torch.zeros(shape[0], 1, shape[2])
    center[: len(means), 0] = means.float()
    return center
