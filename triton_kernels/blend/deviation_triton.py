"""Triton: how far fresh rows lie from those in a cache, plane by plane, where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from tierloom.triton_kernels.memory.launch import vendor_of
from tierloom.triton_kernels.paged_copy.triton import cells
from tierloom.triton_kernels.quantize.triton import KINDS, float_of

if TYPE_CHECKING:
    from tierloom.triton_kernels.paged_copy.triton import DevicePlanes

ROWS, WIDTH = 8, 512
"""Of a program at a time: 16 pairs of numbers a thread."""


def launch_deviation(
    planes: DevicePlanes, slots: torch.Tensor, fresh: torch.Tensor, *, width: int = WIDTH
) -> torch.Tensor:
    """float32 [planes, tokens]: as `deviation` of the CPU, whose arguments are here on the device.
    `width`: channels at a time, a power of two. Enqueues; nothing is validated, nothing waits."""
    kind = KINDS[str(fresh.dtype).removeprefix("torch.")]
    many, tokens = fresh.shape[:2]
    found = torch.empty(many, tokens, device=slots.device)
    rows = 256 if vendor_of(slots.device) == "interpreter" else ROWS
    channels = planes.heads * planes.dim
    squares[(triton.cdiv(tokens, rows), many)](
        planes.table, slots, fresh.view(torch.int16 if fresh.itemsize == 2 else torch.int32),
        found, tokens, BLOCK_TOKENS=planes.block_tokens, HEADS=planes.heads, HEAD=planes.dim,
        KIND=kind, WIDE=not planes.has_narrow, ROWS=rows,
        WIDTH=min(width, triton.next_power_of_2(channels)),
    )  # fmt: skip
    return found


@triton.jit
def squares(
    planes, slots, fresh, found, tokens,
    BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, KIND: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, planes)."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + t, mask=t < tokens, other=-1)
    row = tl.program_id(1).to(tl.int64) * tokens + t
    plane = planes + tl.program_id(1) * 6
    SIZE: tl.constexpr = 4 if KIND == 2 else 2
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.static_range(0, HEADS * HEAD, WIDTH):
        c = first + tl.arange(0, WIDTH)
        mask = (slot >= 0)[:, None] & (c < HEADS * HEAD)[None, :]
        there = cells(plane, slot, c, BLOCK_TOKENS, HEADS, HEAD, SIZE, WIDE)
        kept = float_of(tl.load(there, mask=mask, other=0), KIND)
        here = fresh + (row * (HEADS * HEAD))[:, None] + c[None, :]
        off = float_of(tl.load(here, mask=mask, other=0), KIND) - kept
        total += off * off
    tl.store(found + row, tl.sum(total, 1), mask=t < tokens)
