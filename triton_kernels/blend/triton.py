"""Triton: frames placed with their K turned to another place; the same bytes as `blend/cpu.py`.

A program has some rows of one head. It loads both numbers of a pair and stores both, so that what
lies in the host's memory is read once; channels that do not turn are copied as bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import triton
import triton.language as tl

from tierloom.triton_kernels.blend.turns import fit
from tierloom.triton_kernels.memory.launch import on_device, vendor_of
from tierloom.triton_kernels.paged_copy.triton import cells
from tierloom.triton_kernels.quantize.triton import KINDS, float_of, written
from tierloom.triton_kernels.rope.pages_triton import layers_of, slots_of

if TYPE_CHECKING:
    import torch

    from tierloom.triton_kernels.blend.turns import TurnTable
    from tierloom.triton_kernels.memory.tables import PlaneTable
    from tierloom.triton_kernels.paged_copy.triton import DeviceFrames, DevicePlanes

ELEMENTS = 4096
"""Of a program, if all planes are wide: 32 numbers in float32 a thread."""
NARROW_ELEMENTS = 2048
"""Element by element, each needs an address of its own."""


@dataclass(frozen=True, slots=True)
class DeviceTurns:
    """A `TurnTable` on the device; it owns its tensors."""

    at: torch.Tensor
    """int32 [frames, layers] which row of `cos` and `sin` turns K; -1: it is copied as it is."""
    cos: torch.Tensor
    """float32 [any, half]"""
    sin: torch.Tensor
    first: int
    interleaved: bool
    kind: str
    dim: int
    """Channels of a head."""

    @classmethod
    def of(cls, turn: TurnTable, planes: PlaneTable, device: torch.device | str) -> DeviceTurns:
        """Copies to the device; ValueError as from `scatter_turned_frames`. What turns by nothing
        is copied."""
        fit(planes, turn)
        rows, kinds, half = turn.cos.shape
        still = (turn.cos == 1).all(axis=2) & (turn.sin == 0).all(axis=2)
        row, kind = turn.frame[:, None], turn.kind[None, :]
        at = np.where((row >= 0) & (kind >= 0), row * kinds + kind, -1)
        at[(at >= 0) & still.ravel()[at]] = -1
        return cls(
            on_device(at.astype(np.int32), device),
            on_device(turn.cos.reshape(rows * kinds, half), device),
            on_device(turn.sin.reshape(rows * kinds, half), device),
            turn.first, turn.interleaved, turn.dtype, planes.dim,
        )  # fmt: skip


def launch_scatter_turned(
    planes: DevicePlanes, frames: DeviceFrames, slots: torch.Tensor, turns: DeviceTurns, *,
    elements: int | None = None,
) -> None:  # fmt: skip
    """`launch_paged_copy` from frames to the cache, K of each frame turned as `turns` says, like
    `scatter_turned_frames`; who calls has verified the frames. `elements`: about as many a program.
    """
    if not len(frames.table) or not frames.rows:
        return
    heads = planes.heads * planes.dim // turns.dim
    many = NARROW_ELEMENTS if planes.has_narrow else ELEMENTS
    if vendor_of(slots.device) == "interpreter":  # which pays per operation
        many = 1 << 16
    rows = max(1, (elements or many) // triton.next_power_of_2(turns.dim))
    tiles = triton.cdiv(frames.rows, rows) * heads
    scatter_turned[(tiles, frames.span * planes.kv, len(frames.table))](
        *(planes.table, frames.table, slots, len(planes.table) // planes.kv),
        *(turns.at, turns.cos, turns.sin),
        KV=planes.kv, BLOCK_TOKENS=planes.block_tokens, HEADS=planes.heads, HEAD=planes.dim,
        KIND=KINDS[turns.kind], HAS_WIDE=planes.has_wide, HAS_NARROW=planes.has_narrow,
        DIM=turns.dim, FIRST=turns.first, HALF=turns.cos.shape[1], NEIGHBORS=turns.interleaved,
        ROWS=rows, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def scatter_turned(
    planes, frames, slots, layers, at, cos, sin,
    KV: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    KIND: tl.constexpr, HAS_WIDE: tl.constexpr, HAS_NARROW: tl.constexpr, DIM: tl.constexpr,
    FIRST: tl.constexpr, HALF: tl.constexpr, NEIGHBORS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles * heads, planes of the largest frame, frames)."""
    entry = frames + tl.program_id(2) * 6
    layer, span = layers_of(entry)
    q = tl.program_id(1)
    if q >= span * KV:
        return
    TILES: tl.constexpr = HEADS * HEAD // DIM
    t = (tl.program_id(0) // TILES) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(0) % TILES * DIM
    slot = slots_of(entry, slots, t)
    plane = planes + ((q // span) * layers + layer + q % span) * 6
    turn = tl.load(at + tl.program_id(2) * layers + layer + q, mask=q < span, other=-1)
    frame, row = tl.load(entry), q * tl.load(entry + 3) + t
    if HAS_WIDE and HAS_NARROW:
        if tl.load(plane + 5) != 0:
            _place(
                plane, frame, row, slot, start, turn, cos, sin, BLOCK_TOKENS, HEADS, HEAD, KIND,
                DIM, FIRST, HALF, NEIGHBORS, True,
            )  # fmt: skip
        else:
            _place(
                plane, frame, row, slot, start, turn, cos, sin, BLOCK_TOKENS, HEADS, HEAD, KIND,
                DIM, FIRST, HALF, NEIGHBORS, False,
            )  # fmt: skip
    else:
        _place(
            plane, frame, row, slot, start, turn, cos, sin, BLOCK_TOKENS, HEADS, HEAD, KIND,
            DIM, FIRST, HALF, NEIGHBORS, HAS_WIDE,
        )  # fmt: skip


@triton.jit
def _place(
    plane, frame, row, slot, start, turn, cos, sin,
    BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, KIND: tl.constexpr,
    DIM: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, NEIGHBORS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    if turn >= 0:
        if HALF > 0:
            _turn(
                plane, frame, row, slot, start, cos + turn * HALF, sin + turn * HALF,
                BLOCK_TOKENS, HEADS, HEAD, KIND, FIRST, HALF, NEIGHBORS, WIDE,
            )  # fmt: skip
        END: tl.constexpr = FIRST + 2 * HALF
        if FIRST > 0:
            _copy(
                plane, frame, row, slot, start,
                BLOCK_TOKENS, HEADS, HEAD, KIND, FIRST, WIDE,
            )  # fmt: skip
        if END < DIM:
            _copy(
                plane, frame, row, slot, start + END,
                BLOCK_TOKENS, HEADS, HEAD, KIND, DIM - END, WIDE,
            )  # fmt: skip
    else:
        _copy(
            plane, frame, row, slot, start,
            BLOCK_TOKENS, HEADS, HEAD, KIND, DIM, WIDE,
        )  # fmt: skip


@triton.jit
def _channels(start, MANY: tl.constexpr):
    k = tl.arange(0, triton.next_power_of_2(MANY))
    return start + k, k < MANY


@triton.jit
def _cells(
    plane, frame, row, slot, c,
    BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, KIND: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Where channels c lie in the cache, and where in the frame."""
    there = cells(plane, slot, c, BLOCK_TOKENS, HEADS, HEAD, 4 if KIND == 2 else 2, WIDE)
    here = tl.multiple_of(frame.to(there.dtype), 16)
    return there, here + (row * (HEADS * HEAD))[:, None] + c[None, :]


@triton.jit
def _copy(
    plane, frame, row, slot, start,
    BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, KIND: tl.constexpr,
    MANY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    c, inside = _channels(start, MANY)
    there, here = _cells(plane, frame, row, slot, c, BLOCK_TOKENS, HEADS, HEAD, KIND, WIDE)
    mask = (slot >= 0)[:, None] & inside[None, :]
    tl.store(there, tl.load(here, mask=mask, eviction_policy="evict_first"), mask=mask)


@triton.jit
def _turn(
    plane, frame, row, slot, start, cos, sin,
    BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, KIND: tl.constexpr,
    FIRST: tl.constexpr, HALF: tl.constexpr, NEIGHBORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
    ROWS: tl.constexpr = slot.shape[0]
    f, (c, inside) = tl.arange(0, BLOCK), _channels(start, HALF)
    cosine = tl.load(cos + f, mask=inside, other=1.0)[None, :]
    sine = tl.load(sin + f, mask=inside, other=0.0)[None, :]
    live = (slot >= 0)[:, None]
    if NEIGHBORS:
        c, inside = _channels(start, 2 * HALF)
        there, here = _cells(
            plane, frame, row, slot, c + FIRST, BLOCK_TOKENS, HEADS, HEAD, KIND, WIDE
        )
        mask = live & inside[None, :]
        bits = tl.load(here, mask=mask, other=0, eviction_policy="evict_first")
        a, b = tl.split(tl.reshape(bits, (ROWS, BLOCK, 2)))
        u, v = float_of(a, KIND), float_of(b, KIND)
        a, b = written(u * cosine - v * sine, KIND), written(v * cosine + u * sine, KIND)
        both = tl.reshape(tl.join(a, b), (ROWS, 2 * BLOCK))
        tl.store(there, both, mask=mask)
    else:
        at_a, from_a = _cells(
            plane, frame, row, slot, c + FIRST, BLOCK_TOKENS, HEADS, HEAD, KIND, WIDE
        )
        at_b, from_b = _cells(
            plane, frame, row, slot, c + (FIRST + HALF), BLOCK_TOKENS, HEADS, HEAD, KIND, WIDE
        )
        mask = live & inside[None, :]
        u = float_of(tl.load(from_a, mask=mask, other=0, eviction_policy="evict_first"), KIND)
        v = float_of(tl.load(from_b, mask=mask, other=0, eviction_policy="evict_first"), KIND)
        tl.store(at_a, written(u * cosine - v * sine, KIND), mask=mask)
        tl.store(at_b, written(v * cosine + u * sine, KIND), mask=mask)
