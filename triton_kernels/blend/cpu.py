"""numba: frames placed with their K turned to another place, the twin of `blend/triton.py`.

Rows are turned some at a time in a buffer that stays in the nearest cache, and go on from there by
the plain copy: so every layout, run and streaming store of `paged_copy` serves here as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from tierloom.triton_kernels.blend.turns import fit
from tierloom.triton_kernels.checksum.xxh3_cpu import XXH3_START, xxh3_64
from tierloom.triton_kernels.memory.floats import pair_turner
from tierloom.triton_kernels.memory.machine_code import compiled
from tierloom.triton_kernels.memory.raw import copy_bytes, prefetch, publish
from tierloom.triton_kernels.memory.tables import CORRUPT, PLACED, FrameTable, PlaneTable
from tierloom.triton_kernels.paged_copy.cpu import copy_plane

if TYPE_CHECKING:
    import numpy.typing as npt

    from tierloom.triton_kernels.blend.turns import TurnTable

BITS = {"bfloat16": np.uint16, "float16": np.int16, "float32": np.uint32}
"""Element types that can be turned, and what holds their bits (`memory/floats.py`)."""
_BUFFER = 16384
"""Bytes that are turned at a time, if a row is not longer."""
_AHEAD = 3072
"""Bytes ahead of what is turned that are fetched: while a buffer is placed, nothing is read."""
_LANES = 16
"""Pairs that are turned at a time, if half a head is not shorter."""


def scatter_turned_frames(
    planes: PlaneTable,
    frames: FrameTable,
    slots: npt.NDArray[np.int64],
    stop: npt.NDArray[np.uint8],
    turn: TurnTable,
    *,
    verify: bool = True,
) -> None:
    """`scatter_frames` that turns K of frames whose `turn.frame` is not -1.

    ``(a, b)`` of a pair becomes ``(a cos - b sin, b cos + a sin)`` in float32, rounded half to even
    and kept finite as all of `memory/floats.py`. All else is copied bit for bit: V, channels that
    do not turn, layers of kind -1, and frames whose row of `turn` turns by nothing. Promises,
    ownership and the want of validation are those of `scatter_frames`; raises ValueError where
    `turn` cannot be of these planes.
    """
    fit(planes, turn)
    held = np.empty(max(_BUFFER, planes.row_bytes) // planes.itemsize, BITS[turn.dtype])
    _scatter(
        *(planes.base, planes.stride, planes.kv, planes.block_tokens),
        *(planes.heads, planes.dim, planes.itemsize),
        *(frames.address, frames.nbytes, frames.layer, frames.rows, frames.take, frames.slot0),
        *(frames.checksum, frames.status, slots, stop, verify),
        *(turn.frame, turn.kind, turn.cos, turn.sin, turn.first, turn.interleaved, held),
    )


@compiled(nogil=True)
def _scatter(
    base, stride, kv, block_tokens, heads, dim, itemsize,
    address, nbytes, layer, rows, take, slot0, checksum, status, slots, stop, verify,
    turns, kinds, cos, sin, first, interleaved, held,
):  # fmt: skip
    layers = len(base) // kv
    row_bytes = heads * dim * itemsize
    for f in range(len(address)):
        if stop[0]:
            return
        if verify and xxh3_64(address[f], nbytes[f]) != checksum[f]:
            status[f] = CORRUPT
            continue
        mine = slots[slot0[f] : slot0[f] + take[f]]
        frame = address[f]
        for half in range(kv):
            for i in range(layer[f, 0], layer[f, 1]):
                plane, kind, row = half * layers + i, kinds[i], turns[f]
                turned = half == 0 and row >= 0 and kind >= 0
                if turned and ((cos[row, kind] != 1).any() or (sin[row, kind] != 0).any()):
                    _place_turned(
                        base[plane], stride[plane], block_tokens, heads, dim, itemsize, frame,
                        mine, cos[row, kind], sin[row, kind], first, interleaved, held,
                    )  # fmt: skip
                else:
                    copy_plane(
                        base[plane], stride[plane], block_tokens, heads, dim, itemsize,
                        frame, mine, False, XXH3_START, 0, 0,
                    )  # fmt: skip
                frame += rows[f] * row_bytes
        publish()
        status[f] = PLACED


@njit(nogil=True)
def _place_turned(
    base, steps, block_tokens, heads, dim, itemsize, frame, slots, cos, sin, first, interleaved,
    held,
):  # fmt: skip
    row, to = heads * dim * itemsize, held.ctypes.data
    many = len(held) * itemsize // row
    for t in range(0, len(slots), many):
        some = slots[t : t + many]
        if some.max() < 0:
            continue
        source, nbytes, half = frame + t * row, len(some) * row, len(cos)
        if 2 * half < dim:
            copy_bytes(to, source, nbytes)
        heads_at = range(first * itemsize, nbytes, dim * itemsize)
        turn = cos.ctypes.data, sin.ctypes.data, held[0]  # which kind of float it is
        if interleaved:
            _turn_neighbors(to, source, heads_at, half, itemsize, *turn)
        else:
            _turn_halves(to, source, heads_at, half, itemsize, *turn)
        copy_plane(
            base, steps, block_tokens, heads, dim, itemsize, to, some, False, XXH3_START, 0, 0
        )


def _turner(interleaved):
    turn, turn_one = pair_turner(_LANES, interleaved), pair_turner(1, interleaved)
    width = 2 if interleaved else 1

    @njit(nogil=True)
    def turn_heads(to, source, heads_at, half, itemsize, cos, sin, like):
        whole, apart = half // _LANES * _LANES, half * itemsize
        for head in heads_at:
            for line in range(0, heads_at.step, 64):
                prefetch(source + head + _AHEAD + line)
            for i in range(0, whole, _LANES):
                x = head + i * width * itemsize
                turn(to + x, source + x, apart, cos + 4 * i, sin + 4 * i, like)
            for i in range(whole, half):
                x = head + i * width * itemsize
                turn_one(to + x, source + x, apart, cos + 4 * i, sin + 4 * i, like)

    return turn_heads


_turn_halves, _turn_neighbors = _turner(False), _turner(True)
