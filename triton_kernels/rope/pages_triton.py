"""Triton: parts of kernels that read a paged cache as numbers, K turned back, and write it.

The tables are those of `paged_copy.py`. A program works on some rows and channels of a plane, whose
channels are those of all its heads side by side, whatever the cache's layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tierloom.triton_kernels.paged_copy.triton import cells
from tierloom.triton_kernels.quantize.triton import float_of, written


@triton.jit
def layers_of(entry):
    """A frame's first layer, and how many it has."""
    layer = tl.load(entry + 1)
    return layer, tl.load(entry + 2) - layer


@triton.jit
def tile_of(entry, CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The frame's rows; the program's rows and channels."""
    TILES: tl.constexpr = (CHANNELS + WIDTH - 1) // WIDTH
    t = (tl.program_id(0) // TILES) * ROWS + tl.arange(0, ROWS)
    return tl.load(entry + 3), t, (tl.program_id(0) % TILES) * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def slots_of(entry, slots, t):
    return tl.load(slots + tl.load(entry + 5) + t, mask=t < tl.load(entry + 4), other=-1)


@triton.jit
def turned(
    y, p, cos, sin, turn, live, c, ON: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Each number of channels c with its partner, onwards or back; the same products and sums as
    in halves."""
    i = c % DIM
    if DIM % HALF == 0:
        j = c % HALF
    else:
        j = i % HALF
    at = turn[:, None] * HALF + j[None, :]
    mask = live[:, None] & (i < 2 * HALF)[None, :]
    sine = tl.load(sin + at, mask=mask, other=0.0)
    lower = (i < HALF)[None, :]
    if ON:
        sine = tl.where(lower, -sine, sine)
    else:
        sine = tl.where(lower, sine, -sine)
    return tl.where(mask, y * tl.load(cos + at, mask=mask, other=1.0) + p * sine, y)


@triton.jit
def to_partner(c, DIM: tl.constexpr, HALF: tl.constexpr):
    """How many channels away each channel's partner is; in this form the compiler sees runs."""
    i = c % DIM
    away = HALF - 2 * HALF * (i >= HALF).to(tl.int32)
    return away * (i < 2 * HALF).to(tl.int32)


@triton.jit
def turned_back(
    plane, slot, c, cos, sin, turn, is_key,
    BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, KIND: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, HAS_WIDE: tl.constexpr, HAS_NARROW: tl.constexpr,
):  # fmt: skip
    """float32 [rows, channels] of the cache, K turned back; zero where there is no slot."""
    if HAS_WIDE and HAS_NARROW:
        if tl.load(plane + 5) != 0:
            y = _turned_back(
                plane, slot, c, cos, sin, turn, is_key,
                BLOCK_TOKENS, HEADS, HEAD, KIND, DIM, HALF, True,
            )  # fmt: skip
        else:
            y = _turned_back(
                plane, slot, c, cos, sin, turn, is_key,
                BLOCK_TOKENS, HEADS, HEAD, KIND, DIM, HALF, False,
            )  # fmt: skip
    else:
        y = _turned_back(
            plane, slot, c, cos, sin, turn, is_key,
            BLOCK_TOKENS, HEADS, HEAD, KIND, DIM, HALF, HAS_WIDE,
        )  # fmt: skip
    return y


@triton.jit
def _turned_back(
    plane, slot, c, cos, sin, turn, is_key,
    BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, KIND: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = 4 if KIND == 2 else 2
    at = cells(plane, slot, c, BLOCK_TOKENS, HEADS, HEAD, SIZE, WIDE)
    mask = (slot >= 0)[:, None] & (c < HEADS * HEAD)[None, :]
    y = float_of(tl.load(at, mask=mask, other=0), KIND)
    if HALF > 0:  # noqa: SIM102
        if is_key:
            away = to_partner(c, DIM, HALF)
            if not WIDE:
                away = away * (tl.load(plane + 4) // SIZE)
            p = float_of(tl.load(at + away[None, :], mask=mask, other=0), KIND)
            y = turned(y, p, cos, sin, turn, slot >= 0, c, False, DIM, HALF)
    return y


@triton.jit
def place(
    plane, slot, c, y,
    BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, KIND: tl.constexpr,
    HAS_WIDE: tl.constexpr, HAS_NARROW: tl.constexpr,
):  # fmt: skip
    """float32 into the cache, rounded as `floats` rounds; not where there is no slot."""
    mask = (slot >= 0)[:, None] & (c < HEADS * HEAD)[None, :]
    SIZE: tl.constexpr = 4 if KIND == 2 else 2
    bits = written(y, KIND)
    if HAS_WIDE and HAS_NARROW:
        if tl.load(plane + 5) != 0:
            at = cells(plane, slot, c, BLOCK_TOKENS, HEADS, HEAD, SIZE, True)
            tl.store(at, bits, mask=mask)
        else:
            at = cells(plane, slot, c, BLOCK_TOKENS, HEADS, HEAD, SIZE, False)
            tl.store(at, bits, mask=mask)
    else:
        at = cells(plane, slot, c, BLOCK_TOKENS, HEADS, HEAD, SIZE, HAS_WIDE)
        tl.store(at, bits, mask=mask)
