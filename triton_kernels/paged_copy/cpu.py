"""Copies between the engine's paged cache and frames on a CPU: the numba twin of `paged_copy`.

One call serves a batch of frames, holds no GIL, and checks each frame while it is hot in cache.
Parallelism is several pool threads calling at once, never `prange`, whose workqueue layer is
not thread-safe. Rows that follow one another in the cache are moved as one run, past the
caches; strided channels (K transposed inside its block) fall back to element loops, plane by
plane. `PlaneTable.of_blocks` makes the same code a copy of whole blocks in the engine's order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from numba import njit

from tierloom.triton_kernels.checksum.xxh3_cpu import XXH3_START, xxh3_64, xxh3_absorb, xxh3_end
from tierloom.triton_kernels.memory.machine_code import compiled
from tierloom.triton_kernels.memory.raw import (
    copy_bytes,
    move8,
    move16,
    move32,
    move64,
    publish,
    stream_lines,
    zero_bytes,
)
from tierloom.triton_kernels.memory.tables import CORRUPT, PLACED, FrameTable, PlaneTable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_RUN = 16384
"""Bytes after which a run is cut, so that its checksum finds it in the nearest cache."""
_SHORT = 1024
"""Bytes below which a run that does not fit whole lines is not worth three copies."""


def gather_frames(
    planes: PlaneTable,
    frames: FrameTable,
    slots: npt.NDArray[np.int64],
    stop: npt.NDArray[np.uint8],
    *,
    checksum: bool = True,
) -> None:
    """Fill frames from the cache; then their `checksum` (unless told not to) and `status`.

    Frame f takes its rows from ``slots[slot0 : slot0 + take]``, an int64 list of token slots;
    rows of slot -1 and rows `take` to `rows` are zeroed, so that no stale memory is stored.
    `stop` (uint8 [1]) is read before each frame: once it is not 0 the call returns, and the
    frames it has not reached keep their `status`.

    Arrays are contiguous and writable; for any other kind numba would compile anew. Nothing is
    validated: a wrong address, stride or slot reads and writes foreign memory.
    The caller owns all memory and keeps it alive; frames must not overlap the cache.
    """
    _gather(
        *(planes.base, planes.stride, planes.kv, planes.block_tokens),
        *(planes.heads, planes.dim, planes.itemsize),
        *(frames.address, frames.nbytes, frames.layer, frames.rows, frames.take, frames.slot0),
        *(frames.checksum, frames.status, slots, stop, checksum),
    )


def scatter_frames(
    planes: PlaneTable,
    frames: FrameTable,
    slots: npt.NDArray[np.int64],
    stop: npt.NDArray[np.uint8],
    *,
    verify: bool = True,
) -> None:
    """Place the first `take` rows of frames into the cache, and set each frame's `status`.

    Slots, `stop` and the want of validation are as in `gather_frames`; the row of a slot -1
    is left as it is. With `verify`, a frame whose `nbytes` do not hash to its `checksum`
    becomes CORRUPT, and not a byte of it is written.
    """
    _scatter(
        *(planes.base, planes.stride, planes.kv, planes.block_tokens),
        *(planes.heads, planes.dim, planes.itemsize),
        *(frames.address, frames.nbytes, frames.layer, frames.rows, frames.take, frames.slot0),
        *(frames.checksum, frames.status, slots, stop, verify),
    )


@compiled(nogil=True)
def _gather(
    base, stride, kv, block_tokens, heads, dim, itemsize,
    address, nbytes, layer, rows, take, slot0, checksum, status, slots, stop, with_checksum,
):  # fmt: skip
    row_bytes = heads * dim * itemsize
    in_passing = with_checksum and row_bytes % 64 == 0
    in_passing &= (stride[:, 2] == dim * itemsize).all() and (stride[:, 3] == itemsize).all()
    for f in range(len(address)):
        if stop[0]:
            return
        copied = kv * (layer[f, 1] - layer[f, 0]) * rows[f] * row_bytes
        total = copied if in_passing and nbytes[f] == copied > 240 else 0
        lanes = _copy_frame(
            base, stride, kv, block_tokens, heads, dim, itemsize,
            address[f], layer[f], rows[f], slots[slot0[f] : slot0[f] + take[f]], True, total,
        )  # fmt: skip
        publish()
        if total:
            checksum[f] = xxh3_end(lanes, address[f] + total - 64, total)
        elif with_checksum:
            checksum[f] = xxh3_64(address[f], nbytes[f])
        status[f] = PLACED


@compiled(nogil=True)
def _scatter(
    base, stride, kv, block_tokens, heads, dim, itemsize,
    address, nbytes, layer, rows, take, slot0, checksum, status, slots, stop, verify,
):  # fmt: skip
    for f in range(len(address)):
        if stop[0]:
            return
        if verify and xxh3_64(address[f], nbytes[f]) != checksum[f]:
            status[f] = CORRUPT
            continue
        _copy_frame(
            base, stride, kv, block_tokens, heads, dim, itemsize,
            address[f], layer[f], rows[f], slots[slot0[f] : slot0[f] + take[f]], False, 0,
        )  # fmt: skip
        publish()
        status[f] = PLACED


@njit(nogil=True)
def _copy_frame(
    base, stride, kv, block_tokens, heads, dim, itemsize, start, layer, rows, slots, gather, total
):
    """Copy one frame; with `total`, return the XXH3 lanes of its `total` bytes as well.

    They are taken from each run while it is in the nearest cache: the frame itself is written
    past the caches, and would have to be read back. Wants whole rows of 64-byte multiples.
    """
    row_bytes = heads * dim * itemsize
    layers = len(base) // kv
    lanes = XXH3_START
    frame = start
    for half in range(kv):
        for plane in range(half * layers + layer[0], half * layers + layer[1]):
            lanes = copy_plane(
                base[plane], stride[plane], block_tokens, heads, dim, itemsize,
                frame, slots, gather, lanes, frame - start, total,
            )  # fmt: skip
            if gather and rows > len(slots):
                end, missing = frame + len(slots) * row_bytes, (rows - len(slots)) * row_bytes
                lanes = _zero(end, missing, lanes, end - start, total)
            frame += rows * row_bytes
    return lanes


@njit(nogil=True)
def copy_plane(
    base, steps, block_tokens, heads, dim, itemsize, rows, slots, gather, lanes, before, total
):
    """Copy one plane's rows of `slots` to or from contiguous ones at `rows`; see `_copy_frame`."""
    if steps[3] == itemsize:
        return _copy_rows(
            base, steps, block_tokens, heads, dim * itemsize,
            rows, slots, gather, lanes, before, total,
        )  # fmt: skip
    if itemsize == 1:
        _copy8(base, steps, block_tokens, heads, dim, rows, slots, gather)
    elif itemsize == 2:
        _copy16(base, steps, block_tokens, heads, dim, rows, slots, gather)
    elif itemsize == 4:
        _copy32(base, steps, block_tokens, heads, dim, rows, slots, gather)
    else:
        _copy64(base, steps, block_tokens, heads, dim, rows, slots, gather)
    return lanes


@njit(nogil=True)
def _copy_rows(
    base, steps, block_tokens, heads, head_bytes, frame, slots, gather, lanes, before, total
):
    row_bytes = heads * head_bytes
    whole = steps[2] == head_bytes
    t = 0
    while t < len(slots):
        slot = slots[t]
        at = t * row_bytes
        t += 1
        if slot < 0:
            if gather:
                lanes = _zero(frame + at, row_bytes, lanes, before + at, total)
            continue
        block, token = slot // block_tokens, slot % block_tokens
        cache = base + block * steps[0] + token * steps[1]
        if not whole:
            for head in range(heads):
                _move(cache + head * steps[2], frame + at + head * head_bytes, head_bytes, gather)
            continue
        run = row_bytes
        while run < _RUN and t < len(slots) and slots[t] == slot + 1:
            slot += 1
            token += 1
            if token == block_tokens:
                block, token = block + 1, 0
            if base + block * steps[0] + token * steps[1] != cache + run:
                break
            run += row_bytes
            t += 1
        _move(cache, frame + at, run, gather)
        if total:
            lanes = xxh3_absorb(lanes, cache, before + at, run, total)
    return lanes


@njit(nogil=True)
def _zero(at, nbytes, lanes, before, total):
    zero_bytes(at, nbytes)
    return xxh3_absorb(lanes, at, before, nbytes, total) if total else lanes


@njit(nogil=True)
def _move(cache, row, nbytes, gather):
    to, source = (row, cache) if gather else (cache, row)
    head = -to % 64
    lines = (nbytes - head) // 64 * 64
    if lines < _SHORT and (head or lines < nbytes):
        copy_bytes(to, source, nbytes)
        return
    if head:
        copy_bytes(to, source, head)
    stream_lines(to + head, source + head, lines)
    if head + lines < nbytes:
        copy_bytes(to + head + lines, source + head + lines, nbytes - head - lines)


def _element_copy(itemsize, move):
    """A copy of rows whose channels are apart, for elements that `move` moves."""

    @njit(nogil=True)
    def copy(base, steps, block_tokens, heads, dim, frame, slots, gather):
        row_bytes = heads * dim * itemsize
        t = 0
        while t < len(slots):
            slot = slots[t]
            row = frame + t * row_bytes
            if slot < 0:
                if gather:
                    zero_bytes(row, row_bytes)
                t += 1
                continue
            token = slot % block_tokens
            cache = base + (slot // block_tokens) * steps[0] + token * steps[1]
            run = 1  # slots that follow in the block: tokens innermost walk the cache in order
            while token + run < block_tokens and t + run < len(slots):
                if slots[t + run] != slot + run:
                    break
                run += 1
            for head in range(heads):
                for channel in range(dim):
                    there = cache + head * steps[2] + channel * steps[3]
                    here = row + (head * dim + channel) * itemsize
                    for i in range(run):
                        if gather:
                            move(here + i * row_bytes, there + i * steps[1])
                        else:
                            move(there + i * steps[1], here + i * row_bytes)
            t += run

    return copy


_copy8, _copy16 = _element_copy(1, move8), _element_copy(2, move16)
_copy32, _copy64 = _element_copy(4, move32), _element_copy(8, move64)
