"""Triton: the Walsh-Hadamard transform of vectors after flips of signs, as TurboQuant rotates.

Halves onto halves, as `turboquant_cpu.py` does it: the same sums in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tierloom.triton_kernels.quantize.triton import KINDS, read, rows_for, written

_LEFT = tl.constexpr(2)


def launch_hadamard(x, signs, gains, y, *, kind: str, back: bool, rows: int | None = None) -> None:
    """``y = H (signs * x)``, or back, ``x = (signs * H y) * gains``; H is not normalized.

    x element bits int16 or int32 [planes, vectors, dim], dim a power of two; signs float32 [planes,
    dim]; gains float16 bits [planes, vectors], read on the way back only; y float32 like x.
    Enqueues; nothing is validated, nothing waits.
    """
    planes, vectors, dim = x.shape
    rows = rows or rows_for(x, dim)
    hadamard[(triton.cdiv(vectors, rows), planes)](
        x, signs, gains, y, vectors, KIND=KINDS[kind], BACK=back, DIM=dim,
        STEPS=dim.bit_length() - 1, ROWS=rows, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def hadamard(
    x, signs, gains, y, vectors,
    KIND: tl.constexpr, BACK: tl.constexpr, DIM: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    p, n = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, DIM)
    at = (p.to(tl.int64) * vectors + n)[:, None] * DIM + c[None, :]
    mask = (n < vectors)[:, None]
    sign = tl.load(signs + p * DIM + c)[None, :]
    if BACK:
        v = tl.load(y + at, mask=mask, other=0.0)
    else:
        v = read(x, at, mask, KIND) * sign
    for _ in tl.static_range(STEPS):
        halves = tl.permute(tl.reshape(v, (ROWS, _LEFT, DIM // 2)), (0, 2, 1))
        a, b = tl.split(halves)
        v = tl.reshape(tl.join(a + b, a - b), (ROWS, DIM))
    if BACK:
        gain = tl.load(gains + p.to(tl.int64) * vectors + n, mask=n < vectors, other=0)
        gain = gain.to(tl.float16, bitcast=True).to(tl.float32)[:, None]
        tl.store(x + at, written((v * sign) * gain, KIND), mask=mask)
    else:
        tl.store(y + at, v, mask=mask)
