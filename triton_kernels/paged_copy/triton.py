"""Copies between the engine's paged cache and frames on a GPU: one launch for a whole batch.

The tables of `planes` become two int64 tensors on the device, so all layouts, layers and frames
share one kernel. Planes whose pieces are multiples of 16 bytes move as 32-bit words, which the
compiler joins into 128-bit accesses; the rest (strided channels, odd rows) go element by
element. Whole blocks in the engine's own order are the same copy: `PlaneTable.of_blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import triton
import triton.language as tl

from tierloom.triton_kernels.memory.launch import Tile, on_device, tile_for, vendor_of
from tierloom.triton_kernels.memory.tables import FrameTable, PlaneTable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DevicePlanes:
    """A `PlaneTable` on the device; made once per registered cache, it owns only its table."""

    table: torch.Tensor
    """int64 [planes, 6]: address; bytes per block, token in block, head, channel; is it wide."""
    kv: int
    block_tokens: int
    heads: int
    """1 where the heads of every row follow one another; `dim` then spans them all."""
    dim: int
    itemsize: int
    has_wide: bool
    """Some planes are wide: address, strides and head are multiples of 16 bytes."""
    has_narrow: bool
    """Some planes move element by element."""

    @classmethod
    def of(cls, planes: PlaneTable, device: torch.device | str) -> DevicePlanes:
        """`planes` holds host arrays of device addresses. Copies its table to the device."""
        heads, dim, size = planes.heads, planes.dim, planes.itemsize
        if (planes.stride[:, 3] == size).all() and (planes.stride[:, 2] == dim * size).all():
            heads, dim = 1, heads * dim
        table = np.column_stack([planes.base, planes.stride])
        wide = (table[:, 4] == size) & (table[:, :4] % 16 == 0).all(axis=1)
        wide &= dim * size % 16 == 0
        table = np.column_stack([table, wide]).astype(np.int64)
        return cls(
            table=on_device(table, device),
            kv=planes.kv,
            block_tokens=planes.block_tokens,
            heads=heads,
            dim=dim,
            itemsize=size,
            has_wide=bool(wide.any()),
            has_narrow=not wide.all(),
        )


@dataclass(frozen=True, slots=True)
class DeviceFrames:
    """A `FrameTable` on the device, without its checksums and states; owns only its table."""

    table: torch.Tensor
    """int64 [frames, 6]: address, first layer, one past the last, rows, take, slot0."""
    span: int
    """Most layers of any frame."""
    rows: int
    """Most rows of any frame."""

    @classmethod
    def of(cls, frames: FrameTable, device: torch.device | str) -> DeviceFrames:
        """`frames` holds host arrays; one copy to the device.

        Raises ValueError if a frame does not start on a multiple of 16 bytes.
        """
        if (frames.address % 16).any():
            raise ValueError("a frame on a GPU must start on a multiple of 16 bytes")
        table = np.column_stack(
            [frames.address, frames.layer, frames.rows, frames.take, frames.slot0]
        ).astype(np.int64)
        span = int((frames.layer[:, 1] - frames.layer[:, 0]).max(initial=0))
        rows = int(frames.rows.max(initial=0))
        return cls(on_device(table, device), span, rows)


def launch_paged_copy(
    planes: DevicePlanes,
    frames: DeviceFrames,
    slots: torch.Tensor,
    *,
    gather: bool,
    tile: Tile | None = None,
) -> None:
    """Enqueue the copy on the current stream: cache to frames if `gather`, else the reverse.

    `slots` is int64 on the device, meaning what it means to `gather_frames`: -1 leaves the
    cache's row alone, and zeroes the frame's. At most 65535 frames a launch. Nothing is
    validated, nothing waits; tables, cache and frames must stay alive until the kernel is done.
    """
    if not len(frames.table) or not frames.rows:
        return
    row_bytes = planes.heads * planes.dim * planes.itemsize
    vendor = vendor_of(planes.table.device)
    tile = tile or tile_for(vendor, row_bytes, narrow=planes.has_narrow)
    tiles = triton.cdiv(frames.rows, tile.rows) * triton.cdiv(row_bytes, tile.nbytes)
    paged_copy[(tiles, frames.span * planes.kv, len(frames.table))](
        *(planes.table, frames.table, slots, len(planes.table) // planes.kv),
        KV=planes.kv,
        BLOCK_TOKENS=planes.block_tokens,
        HEADS=planes.heads,
        HEAD_BYTES=planes.dim * planes.itemsize,
        ITEMSIZE=planes.itemsize,
        HAS_WIDE=planes.has_wide,
        HAS_NARROW=planes.has_narrow,
        GATHER=gather,
        TILE_ROWS=tile.rows,
        TILE_BYTES=tile.nbytes,
        num_warps=tile.warps,
        enable_fp_fusion=False,
    )


@triton.jit
def paged_copy(
    planes,
    frames,
    slots,
    layers,
    KV: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    HAS_WIDE: tl.constexpr,
    HAS_NARROW: tl.constexpr,
    GATHER: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BYTES: tl.constexpr,
):
    """One program moves TILE_ROWS rows by TILE_BYTES of one plane of one frame.

    Grid: (row tiles * tiles of a row, planes of the largest frame, frames).
    """
    entry = frames + tl.program_id(2) * 6
    layer = tl.load(entry + 1)
    span = tl.load(entry + 2) - layer
    q = tl.program_id(1)
    if q >= span * KV:
        return
    rows = tl.load(entry + 3)
    TILES: tl.constexpr = (HEADS * HEAD_BYTES + TILE_BYTES - 1) // TILE_BYTES
    t = (tl.program_id(0) // TILES) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    tile = tl.program_id(0) % TILES
    slot = tl.load(slots + tl.load(entry + 5) + t, mask=t < tl.load(entry + 4), other=-1)
    plane = planes + ((q // span) * layers + layer + q % span) * 6
    frame = tl.load(entry)
    row = q * rows + t
    kept = t < rows
    if HAS_WIDE and HAS_NARROW:
        if tl.load(plane + 5) != 0:
            _move(
                plane, frame, row, slot, kept, tile,
                BLOCK_TOKENS, HEADS, HEAD_BYTES, 4, True, GATHER, TILE_BYTES,
            )  # fmt: skip
        else:
            _move(
                plane, frame, row, slot, kept, tile,
                BLOCK_TOKENS, HEADS, HEAD_BYTES, ITEMSIZE, False, GATHER, TILE_BYTES,
            )  # fmt: skip
    else:
        _move(
            plane, frame, row, slot, kept, tile, BLOCK_TOKENS, HEADS, HEAD_BYTES,
            4 if HAS_WIDE else ITEMSIZE, HAS_WIDE, GATHER, TILE_BYTES,
        )  # fmt: skip


@triton.jit
def _move(
    plane,
    frame,
    row,
    slot,
    kept,
    tile,
    BLOCK_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    PIECE: tl.constexpr,
    WIDE: tl.constexpr,
    GATHER: tl.constexpr,
    TILE_BYTES: tl.constexpr,
):
    """Move a tile in pieces of PIECE bytes."""
    HEAD: tl.constexpr = HEAD_BYTES // PIECE
    WIDTH: tl.constexpr = TILE_BYTES // PIECE
    piece = tile * WIDTH + tl.arange(0, WIDTH)
    there = cells(plane, slot, piece, BLOCK_TOKENS, HEADS, HEAD, PIECE, WIDE)
    here = tl.multiple_of(frame.to(there.dtype), 16)
    here = here + (row * (HEADS * HEAD))[:, None] + piece[None, :]
    inside = (piece < HEADS * HEAD)[None, :]
    taken = (slot >= 0)[:, None] & inside
    if GATHER:
        value = tl.load(there, mask=taken, other=0, eviction_policy="evict_first")
        tl.store(here, value, mask=kept[:, None] & inside)
    else:
        value = tl.load(here, mask=taken, eviction_policy="evict_first")
        tl.store(there, value, mask=taken)


@triton.jit
def cells(
    plane,
    slot,
    piece,
    BLOCK_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    PIECE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Pointers [slots, pieces] into a plane whose rows are HEADS times HEAD pieces of PIECE bytes.

    WIDE: whatever is added up is a multiple of 16 bytes. Strides are divided by 16 and multiplied
    again so that the compiler sees it: it then joins pieces into one access.
    """
    DTYPE: tl.constexpr = (
        tl.int8 if PIECE == 1 else tl.int16 if PIECE == 2 else tl.int32 if PIECE == 4 else tl.int64
    )
    UNIT: tl.constexpr = 16 if WIDE else PIECE
    base = tl.load(plane).to(tl.pointer_type(DTYPE))
    if WIDE:
        base = tl.multiple_of(base, 16)
    block_step = tl.load(plane + 1) // UNIT * (UNIT // PIECE)
    token_step = tl.load(plane + 2) // UNIT * (UNIT // PIECE)
    head_step = tl.load(plane + 3) // UNIT * (UNIT // PIECE)
    if WIDE:
        channel = piece % HEAD
    else:
        channel = (piece % HEAD) * (tl.load(plane + 4) // PIECE)
    if HEADS > 1:
        channel = channel + (piece // HEAD) * head_step
    row = (slot // BLOCK_TOKENS) * block_step + (slot % BLOCK_TOKENS) * token_step
    return base + row[:, None] + channel[None, :]
