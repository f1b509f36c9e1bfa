"""Triton: KV elements to 8 and 4 bits and back; the same bytes as `quantize_cpu.py` writes.

Elements travel as their bits and are rounded in integers, so that no compiler's conversion decides;
divisions are IEEE's, and launches forbid fused multiply-adds. An encoder sets `bad` to 1 where a
number is not finite or a scale would not be: what it wrote is then of no use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from tierloom.triton_kernels.memory.launch import vendor_of

if TYPE_CHECKING:
    import torch

KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
_BF16, _FP16 = tl.constexpr(0), tl.constexpr(1)
_INFINITE = tl.constexpr(0x7F800000)
ELEMENTS = 4096
"""Elements of a program: 32 registers each for values and codes at 128 threads."""


def rows_for(like: torch.Tensor, width: int) -> int:
    """Groups of `width` elements (a power of two) that a program works on; the interpreter pays
    per program."""
    many = 1 << 16 if vendor_of(like.device) == "interpreter" else ELEMENTS
    return max(1, many // width)


def launch_int8(x, scales, codes, bad, *, kind: str, encode: bool, rows: int | None = None) -> None:
    """Arrays as for `int8_encode`, on the device, elements as int16 or int32 bits; `bad` int32 [1].
    Enqueues; nothing is validated, nothing waits."""
    groups, width = codes.shape
    block = triton.next_power_of_2(width)
    rows = rows or rows_for(x, block)
    int8_groups[(triton.cdiv(groups, rows),)](
        x, scales, codes, bad, groups, KIND=KINDS[kind], ENCODE=encode, WIDTH=width, BLOCK=block,
        ROWS=rows, enable_fp_fusion=False,
    )  # fmt: skip


def launch_fp8(
    x, scales, codes, bad, *, group: int, kind: str, encode: bool, rows: int | None = None
) -> None:
    """Arrays as for `fp8_encode`; see `launch_int8`."""
    planes, tokens, heads, dim = codes.shape
    block = triton.next_power_of_2(dim)
    fp8_groups[(scales.shape[1], heads, planes)](
        x, scales, codes, bad, tokens, group, KIND=KINDS[kind], ENCODE=encode, HEADS=heads,
        DIM=dim, BLOCK=block, ROWS=min(rows or rows_for(x, block), triton.next_power_of_2(group)),
        enable_fp_fusion=False,
    )  # fmt: skip


def launch_int4(
    x, means, steps, codes, bad, *, first: int, kind: str, encode: bool, rows: int | None = None
) -> None:
    """Arrays as for `int4_encode`; see `launch_int8`. Encoding fills `means` first."""
    planes, tokens, channels = x.shape
    groups = steps.shape[2]
    if encode and means.shape[0]:
        block = 1024 if vendor_of(x.device) == "interpreter" else 128
        channel_means[(triton.cdiv(channels, block), means.shape[0])](
            x, means, bad, tokens, first, channels, KIND=KINDS[kind], BLOCK=block,
            enable_fp_fusion=False,
        )  # fmt: skip
    rows = rows or rows_for(x, 32)
    int4_groups[(triton.cdiv((tokens - first) * groups, rows), planes)](
        x, means, steps, codes, bad, tokens, first, means.shape[0], KIND=KINDS[kind], ENCODE=encode,
        CHANNELS=channels, GROUPS=groups, GROUP=32, ROWS=rows, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def int8_groups(
    x, scales, codes, bad, groups,
    KIND: tl.constexpr, ENCODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    at = n.to(tl.int64)[:, None] * WIDTH + c[None, :]
    mask = (n < groups)[:, None]
    if BLOCK != WIDTH:
        mask = mask & (c < WIDTH)[None, :]
    if ENCODE:
        y = read(x, at, mask, KIND)
        top = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        scale = tl.div_rn(top.to(tl.float32, bitcast=True), 127.0)
        over = (top >= _INFINITE) | (scale > 65504.0)
        if tl.max(over.to(tl.int32), 0) > 0:
            tl.store(bad, 1)
        half = tl.minimum(scale, 65504.0).to(tl.float16)
        tl.store(scales + n, half.to(tl.int16, bitcast=True), mask=n < groups)
        inverse = inverse_of(half.to(tl.float32))
        q = rounded(y * inverse[:, None])
        q = tl.minimum(tl.maximum(q, -127.0), 127.0)
        tl.store(codes + at, q.to(tl.int8), mask=mask)
    else:
        half = tl.load(scales + n, mask=n < groups, other=0).to(tl.float16, bitcast=True)
        q = tl.load(codes + at, mask=mask, other=0).to(tl.float32)
        tl.store(x + at, written(q * half.to(tl.float32)[:, None], KIND), mask=mask)


@triton.jit
def fp8_groups(
    x, scales, codes, bad, tokens, group,
    KIND: tl.constexpr, ENCODE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    g, h, p = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = g * group, tl.minimum((g + 1) * group, tokens)
    c = tl.arange(0, BLOCK)
    base = p.to(tl.int64) * tokens * (HEADS * DIM) + h * DIM
    own = scales + (p * tl.num_programs(0) + g) * HEADS + h
    if ENCODE:
        top = tl.zeros((), tl.int32)
        for first in range(start, end, ROWS):
            t = first + tl.arange(0, ROWS)
            mask = (t < end)[:, None]
            if BLOCK != DIM:
                mask = mask & (c < DIM)[None, :]
            y = read(x, base + t.to(tl.int64)[:, None] * (HEADS * DIM) + c[None, :], mask, KIND)
            size = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            top = tl.maximum(top, tl.max(tl.max(size, 1), 0))
        if top >= _INFINITE:
            tl.store(bad, 1)
        scale = tl.div_rn(top.to(tl.float32, bitcast=True), 448.0)
        scale = tl.where(scale < 1e-30, 0.0, scale)
        tl.store(own, scale)
    else:
        scale = tl.load(own)
    inverse = inverse_of(scale)
    for first in range(start, end, ROWS):
        t = first + tl.arange(0, ROWS)
        mask = (t < end)[:, None]
        if BLOCK != DIM:
            mask = mask & (c < DIM)[None, :]
        at = base + t.to(tl.int64)[:, None] * (HEADS * DIM) + c[None, :]
        if ENCODE:
            tl.store(codes + at, e4m3_of(read(x, at, mask, KIND) * inverse), mask=mask)
        else:
            y = e4m3_read(tl.load(codes + at, mask=mask, other=0))
            tl.store(x + at, written(y * scale, KIND), mask=mask)


@triton.jit
def channel_means(x, means, bad, tokens, first, channels, KIND: tl.constexpr, BLOCK: tl.constexpr):
    c, p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    mask = c < channels
    total = tl.zeros((BLOCK,), tl.float32)
    for t in range(first, tokens):  # one after another: the order of a float sum is part of it
        total += read(x, (p.to(tl.int64) * tokens + t) * channels + c, mask, KIND)
    mean = tl.div_rn(total, tl.maximum(tokens - first, 1).to(tl.float32) + tl.zeros_like(total))
    over = (mean.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x477FE000
    if tl.max((over & mask).to(tl.int32), 0) > 0:
        tl.store(bad, 1)
    half = tl.where(over, 0.0, mean).to(tl.float16)
    tl.store(means + p.to(tl.int64) * channels + c, half.to(tl.int16, bitcast=True), mask=mask)


@triton.jit
def int4_groups(
    x, means, steps, codes, bad, tokens, first, centered,
    KIND: tl.constexpr, ENCODE: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    p, n = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = (tokens - first) * GROUPS
    c, byte, half = tl.arange(0, GROUP), tl.arange(0, GROUP // 2), tl.arange(0, 2)
    channel = (n % GROUPS)[:, None] * GROUP + c[None, :]
    mask = (n < count)[:, None]
    if CHANNELS % GROUP:
        mask = mask & (channel < CHANNELS)
        row = (p.to(tl.int64) * tokens + first + n // GROUPS) * CHANNELS
        at = row[:, None] + channel
    else:  # groups side by side: visible to the compiler, which then moves 16 bytes at once
        at = ((p.to(tl.int64) * tokens + first) * GROUPS + n)[:, None] * GROUP + c[None, :]
    # A limit, since a scalar bool cannot be and-ed into a mask under the interpreter.
    limit = tl.where(p < centered, CHANNELS, 0)
    mean = tl.load(means + p.to(tl.int64) * CHANNELS + channel, mask=channel < limit, other=0)
    mean = mean.to(tl.float16, bitcast=True).to(tl.float32)
    own = p.to(tl.int64) * count + n
    packed = own[:, None] * (GROUP // 2) + byte[None, :]
    if ENCODE:
        y = read(x, at, mask, KIND)
        over = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1) >= _INFINITE
        y = tl.where(mask, y - mean, 0.0)
        low, high = tl.minimum(tl.min(y, 1), 0.0), tl.maximum(tl.max(y, 1), 0.0)
        code = written(tl.div_rn(high - low, 15.25), _FP16).to(tl.int32)
        code = (code + 15) >> 4
        over = over | (code >= 0x7C0)
        if tl.max((over & (n < count)).to(tl.int32), 0) > 0:
            tl.store(bad, 1)
        inverse = inverse_of((code << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))
        zero = tl.minimum(rounded((-low * inverse) * 2.0), 31.0)
        tl.store(steps + own, ((code << 5) | zero.to(tl.int32)).to(tl.int16), mask=n < count)
        q = rounded(y * inverse[:, None] + (zero * 0.5)[:, None])
        q = tl.minimum(tl.maximum(q, 0.0), 15.0).to(tl.int32)
        pairs = tl.reshape(q, (ROWS, 2, GROUP // 2)) << (4 * half)[None, :, None]
        tl.store(codes + packed, tl.sum(pairs, 1).to(tl.uint8), mask=(n < count)[:, None])
    else:
        step = tl.load(steps + own, mask=n < count, other=0).to(tl.int32) & 0xFFFF
        scale = ((step >> 5) << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        shift = (step & 31).to(tl.float32) * 0.5
        both = tl.load(codes + packed, mask=(n < count)[:, None], other=0).to(tl.int32)
        q = (both[:, None, :] >> (4 * half)[None, :, None]) & 15
        y = (tl.reshape(q, (ROWS, GROUP)).to(tl.float32) - shift[:, None]) * scale[:, None]
        tl.store(x + at, written(y + mean, KIND), mask=mask)


@triton.jit
def read(x, at, mask, KIND: tl.constexpr):
    """Element bits as float32."""
    return float_of(tl.load(x + at, mask=mask, other=0), KIND)


@triton.jit
def float_of(bits, KIND: tl.constexpr):
    if KIND == _BF16:
        y = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == _FP16:
        y = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        y = bits.to(tl.float32, bitcast=True)
    return y


@triton.jit
def written(y, KIND: tl.constexpr):
    """float32 as element bits, half to even, saturating."""
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    sign = bits ^ size
    if KIND == _BF16:
        size = tl.minimum(size, 0x7F7F0000)
        size = size + 0x7FFF + ((size >> 16) & 1)
        out = ((sign | size) >> 16).to(tl.int16)
    elif KIND == _FP16:
        out = (sign | tl.minimum(size, 0x477FE000)).to(tl.float32, bitcast=True)
        out = out.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        out = sign | tl.minimum(size, 0x7F7FFFFF)
    return out


@triton.jit
def e4m3_of(y):
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    sign = ((bits ^ size) >> 24) & 0x80
    size = tl.minimum(size, 0x43E00000)
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    tiny = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(size < (121 << 23), tiny, normal) | sign).to(tl.uint8)


@triton.jit
def e4m3_read(code):
    wide = code.to(tl.int32)
    small = wide & 0x7F
    tiny = (small.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
    size = tl.where(small < 8, tiny, (small << 20) + (120 << 23))
    return (size | ((wide & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def rounded(y):
    """Half to even, below 2^22."""
    return (y + 12582912.0) - 12582912.0


@triton.jit
def inverse_of(scale):
    one = tl.zeros_like(scale) + 1.0
    return tl.where(scale > 0.0, tl.div_rn(one, tl.where(scale > 0.0, scale, 1.0)), 0.0)
