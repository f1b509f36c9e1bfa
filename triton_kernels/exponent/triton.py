"""Triton: 16-bit floats as symbols and raw bits, and back; the same bytes as `exponent_cpu` writes.

With shift 6 a program works on a piece of each of the four runs, so that all of its accesses are
of whole vectors. Tables are read through the cache; they have 1 KiB at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tierloom.triton_kernels.memory.launch import vendor_of

ELEMENTS = 2048
"""Of each run that a program works on: 16 a thread."""


def launch_split(x, shift, symbol_of, symbols, rest, *, elements: int | None = None) -> None:
    """Arrays as for `exponent_cpu.split`, on the device, elements as int16 bits. Enqueues; nothing
    is validated, nothing waits."""
    _launch(x, symbols, rest, symbol_of, shift, split=True, elements=elements)


def launch_merge(symbols, rest, shift, top_of, x, *, elements: int | None = None) -> None:
    """Arrays as for `exponent_cpu.merge`, ``top_of`` and elements as int16; see `launch_split`."""
    _launch(x, symbols, rest, top_of, shift, split=False, elements=elements)


def _launch(x, symbols, rest, table, shift, *, split: bool, elements: int | None) -> None:
    n = x.numel()
    run = n if shift == 8 else rest.numel() // 3
    many = 1 << 16 if vendor_of(x.device) == "interpreter" else ELEMENTS
    size = elements or min(many, triton.next_power_of_2(max(run, 16)))
    even = n % 16 == 0
    exponents[(max(1, triton.cdiv(run, size)),)](
        x, symbols, rest, table, n // 16 if even else n, run // 16,
        SHIFT=shift, SPLIT=split, EVEN=even, SIZE=size, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def exponents(
    x, symbols, rest, table, n, sixteens,
    SHIFT: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`n` elements, counted in sixteens where EVEN; runs of 16 * `sixteens`."""
    if EVEN:
        n = n * 16
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    if SHIFT == 8:
        inside = i < n
        if SPLIT:
            own = _split(x, symbols, table, i, inside, SHIFT)
            tl.store(rest + i, own.to(tl.uint8), mask=inside)
        else:
            own = tl.load(rest + i, mask=inside, other=0).to(tl.int32)
            _merge(x, symbols, table, i, inside, own, SHIFT)
    else:
        run = sixteens * 16
        inside = i < run
        if SPLIT:
            d = _split(x, symbols, table, 3 * run + i, inside & (3 * run + i < n), SHIFT)
            for k in tl.static_range(3):
                at = k * run + i
                own = _split(x, symbols, table, at, inside & (at < n), SHIFT)
                own = own | (((d >> (2 * k)) & 3) << 6)
                tl.store(rest + at, own.to(tl.uint8), mask=inside)
        else:
            d = tl.zeros((SIZE,), tl.int32)
            for k in tl.static_range(3):
                at = k * run + i
                own = tl.load(rest + at, mask=inside, other=0).to(tl.int32)
                d = d | ((own >> 6) << (2 * k))
                _merge(x, symbols, table, at, inside & (at < n), own & 63, SHIFT)
            _merge(x, symbols, table, 3 * run + i, inside & (3 * run + i < n), d, SHIFT)


@triton.jit
def _split(x, symbols, symbol_of, at, mask, SHIFT: tl.constexpr):
    """Writes symbols; the elements' low bits as int32, 0 where there is no element."""
    bits = tl.load(x + at, mask=mask, other=0).to(tl.int32) & 0xFFFF
    tl.store(symbols + at, tl.load(symbol_of + (bits >> SHIFT)), mask=mask)
    return bits & ((1 << SHIFT) - 1)


@triton.jit
def _merge(x, symbols, top_of, at, mask, low, SHIFT: tl.constexpr):
    top = tl.load(top_of + tl.load(symbols + at, mask=mask, other=0).to(tl.int32)).to(tl.int32)
    tl.store(x + at, ((top << SHIFT) | low).to(tl.int16), mask=mask)
