"""Triton: `cachegen_cpu` between the engine's pages and the coder's symbols, bit for bit.

One launch serves all planes of all frames of a batch. Where tables are known beforehand, as with a
calibration, symbols come straight from the pages: `launch_encode` with `tables`. Where they are
not, `launch_moments`, then steps and means by the host (some numbers per plane), then
`launch_encode` for q, and `cachegen_symbols.py` for the rest. The way back is `check_escapes` there
and `launch_decode` here. Tokens that are spared are copied by `paged_copy.py`: for the kernels here
a frame begins after them.

All sums and products are those of the numba twin in the same order, and launches forbid fused
multiply-adds: moments are equal, too, since each channel adds up its tokens one after another in
float64. Only the list of escapes comes in no order; sorted by place it is the twin's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from tierloom.triton_kernels.cachegen.symbols_triton import emit, numbers
from tierloom.triton_kernels.memory.launch import vendor_of
from tierloom.triton_kernels.paged_copy.triton import DeviceFrames, DevicePlanes
from tierloom.triton_kernels.quantize.triton import KINDS, inverse_of, rounded
from tierloom.triton_kernels.rope.pages_triton import (
    layers_of,
    place,
    slots_of,
    tile_of,
    to_partner,
    turned,
    turned_back,
)

if TYPE_CHECKING:
    import torch

ELEMENTS = 1024
"""Of a program: 8 a thread, each with its partner, cosine and sine."""
WIDTH = 512
"""Channels of a program, at most."""
TOGETHER = 4
"""Tokens whose loads `moments` starts at once."""
_MOST = tl.constexpr(0x46FFFE00)  # 32767.0
_INFINITE = tl.constexpr(0x7F800000)


class Sites(NamedTuple):
    """What the kernels must know of frames besides `DeviceFrames`; tensors on one device.

    The frames' addresses are those of q int16 or symbols uint8 ``[kv * layers, rows, channels]``;
    `rows`, `take` and `slot0` count from the first token that is not spared.
    """

    table: torch.Tensor
    """int64 [frames, 5]: row of `cos` and `sin` of the first token; rows of `means` and `steps` of
    the first K plane and of the first V plane; where the frame's escapes begin in their lists, and
    how many there are (encoding: how many have room)."""
    cos: torch.Tensor
    """float32 [any, half], as `cachegen_cpu.turns` makes it; half 0: K is not turned."""
    sin: torch.Tensor
    dim: int
    """Channels of a head, of which the first ``2 * half`` are turned."""


class CodeTables(NamedTuple):
    """By which numbers become symbols, and where escapes go; tensors on the same device."""

    tabid: torch.Tensor
    """uint8, like `means`."""
    reach: torch.Tensor
    """int32 [tables]."""
    places: torch.Tensor
    """uint32 [any], the frames' lists one after another, each in no order."""
    values: torch.Tensor
    """int32 [any]."""
    found: torch.Tensor
    """int32 [frames], zero before: how many there are, of which those without room are not kept."""


def launch_moments(
    planes: DevicePlanes, frames: DeviceFrames, slots, sites: Sites, means, spreads, bad, *,
    kind: str, block: int | None = None,
) -> None:  # fmt: skip
    """Means and mean square deviations float64 [any, channels], in the rows that `sites` names,
    over the rows of each frame's planes; its addresses are not used. See `launch_encode`."""
    block = block or min(_width(planes), 128 if vendor_of(slots.device) != "interpreter" else 1024)
    tiles = triton.cdiv(planes.heads * planes.dim, block)
    moments[(tiles, frames.span * planes.kv, len(frames.table))](
        *(planes.table, frames.table, slots, len(planes.table) // planes.kv, sites.table),
        *(sites.cos, sites.sin, means, spreads, bad),
        **_constants(planes, sites, kind), WIDTH=block, TOGETHER=TOGETHER,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def launch_encode(
    planes: DevicePlanes, frames: DeviceFrames, slots, sites: Sites, means, steps, bad, *,
    kind: str, tables: CodeTables | None = None, shape: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """The cache's rows as q int16, or with `tables` as symbols uint8, at the frames' addresses.

    `slots` as for `launch_paged_copy`: the row of slot -1 is one of zeros. `means` and `steps`
    float32 [any, channels]. `bad` int32 [frames] becomes 1 where a number is not finite or too many
    steps off: what was written for that frame is then of no use. `kind` is the cache's dtype;
    `shape`: rows and channels of a program. At most 65535 frames a launch. Enqueues; nothing is
    validated, nothing waits; all tensors must stay alive until the kernel is done.
    """
    grid, tile = _grid(planes, frames, shape)
    encode_pages[grid](
        *(planes.table, frames.table, slots, len(planes.table) // planes.kv, sites.table),
        *(sites.cos, sites.sin, means, steps, bad), *(tables or (None,) * 5),
        **_constants(planes, sites, kind), SYMBOLS=tables is not None, **tile,
    )  # fmt: skip


def launch_decode(
    planes: DevicePlanes, frames: DeviceFrames, slots, sites: Sites, means, steps, bad,
    places, values, *, kind: str, shape: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """The inverse: symbols uint8 and their escapes, by place, into the cache's rows; slot -1 is
    left out, and so is every frame that is `bad`. See `launch_encode`."""
    grid, tile = _grid(planes, frames, shape)
    decode_pages[grid](
        *(planes.table, frames.table, slots, len(planes.table) // planes.kv, sites.table),
        *(sites.cos, sites.sin, means, steps, bad, places, values),
        **_constants(planes, sites, kind), **tile,
    )  # fmt: skip


def _width(planes: DevicePlanes) -> int:
    return max(16, int(triton.next_power_of_2(planes.heads * planes.dim)))


def _constants(planes: DevicePlanes, sites: Sites, kind: str) -> dict[str, object]:
    return {
        "KV": planes.kv, "BLOCK_TOKENS": planes.block_tokens, "HEADS": planes.heads,
        "HEAD": planes.dim, "KIND": KINDS[kind], "DIM": sites.dim, "HALF": sites.cos.shape[1],
        "HAS_WIDE": planes.has_wide, "HAS_NARROW": planes.has_narrow,
    }  # fmt: skip


def _grid(
    planes: DevicePlanes, frames: DeviceFrames, shape: tuple[int, int] | None
) -> tuple[tuple[int, int, int], dict[str, object]]:
    many = vendor_of(planes.table.device) == "interpreter"
    width = _width(planes) if many else min(WIDTH, _width(planes))
    rows, width = shape or ((1 << 16 if many else ELEMENTS) // width, width)
    tiles = triton.cdiv(frames.rows, rows) * triton.cdiv(planes.heads * planes.dim, width)
    return (
        (tiles, frames.span * planes.kv, len(frames.table)),
        {"ROWS": rows, "WIDTH": width, "num_warps": 4, "enable_fp_fusion": False},
    )


@triton.jit
def encode_pages(
    planes, frames, slots, layers, sites, cos, sin, means, steps, bad,
    tabid, reach, places, values, found,
    KV: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    KIND: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HAS_WIDE: tl.constexpr,
    HAS_NARROW: tl.constexpr, SYMBOLS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles * tiles of a row, planes of the largest frame, frames)."""
    f, q = tl.program_id(2), tl.program_id(1)
    layer, span = layers_of(frames + f * 6)
    if q >= span * KV:
        return
    CHANNELS: tl.constexpr = HEADS * HEAD
    rows, t, c = tile_of(frames + f * 6, CHANNELS, ROWS, WIDTH)
    slot = slots_of(frames + f * 6, slots, t)
    plane = planes + ((q // span) * layers + layer + q % span) * 6
    turn = tl.load(sites + f * 5) + t
    inside, kept = c < CHANNELS, (t < rows)[:, None] & (c < CHANNELS)[None, :]
    y = turned_back(
        plane, slot, c, cos, sin, turn, q < span,
        BLOCK_TOKENS, HEADS, HEAD, KIND, DIM, HALF, HAS_WIDE, HAS_NARROW,
    )  # fmt: skip
    own = (tl.load(sites + f * 5 + 1 + q // span) + q % span) * CHANNELS + c
    mean = tl.load(means + own, mask=inside, other=0.0)
    inverse = inverse_of(tl.load(steps + own, mask=inside, other=0.0))
    r = (y - mean[None, :]) * inverse[None, :]
    over = ((r.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= _MOST) & kept  # NaN is, too
    if tl.max(tl.max(over.to(tl.int32), 1), 0) > 0:
        tl.store(bad + f, 1)
    n = rounded(tl.minimum(tl.maximum(r, -32767.0), 32767.0)).to(tl.int32)
    at = (q * rows + t)[:, None] * CHANNELS + c[None, :]
    to = tl.load(frames + f * 6)
    if SYMBOLS:
        limit = tl.load(reach + tl.load(tabid + own, mask=inside, other=0).to(tl.int32))
        emit(
            to, n, at, kept, limit, places, values, found + f,
            tl.load(sites + f * 5 + 3), tl.load(sites + f * 5 + 4),
        )  # fmt: skip
    else:
        out = tl.multiple_of(to.to(tl.pointer_type(tl.int16)), 16)
        tl.store(out + at, n.to(tl.int16), mask=kept)


@triton.jit
def decode_pages(
    planes, frames, slots, layers, sites, cos, sin, means, steps, bad, places, values,
    KV: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    KIND: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HAS_WIDE: tl.constexpr,
    HAS_NARROW: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid as of `encode_pages`."""
    f, q = tl.program_id(2), tl.program_id(1)
    layer, span = layers_of(frames + f * 6)
    if (q >= span * KV) | (tl.load(bad + f) != 0):
        return
    CHANNELS: tl.constexpr = HEADS * HEAD
    rows, t, c = tile_of(frames + f * 6, CHANNELS, ROWS, WIDTH)
    slot = slots_of(frames + f * 6, slots, t)
    plane = planes + ((q // span) * layers + layer + q % span) * 6
    symbols = tl.multiple_of(tl.load(frames + f * 6).to(tl.pointer_type(tl.uint8)), 16)
    own = (tl.load(sites + f * 5 + 1 + q // span) + q % span) * CHANNELS
    row = (q * rows + t) * CHANNELS
    live = slot >= 0
    places, values = places + tl.load(sites + f * 5 + 3), values + tl.load(sites + f * 5 + 3)
    count = tl.load(sites + f * 5 + 4)
    y = numbers(
        symbols, row, c, live, means + own, steps + own, places, values, count, CHANNELS
    )  # fmt: skip
    if HALF > 0:  # noqa: SIM102
        if q < span:
            p = numbers(
                symbols, row, c + to_partner(c, DIM, HALF), live, means + own, steps + own,
                places, values, count, CHANNELS,
            )  # fmt: skip
            turn = tl.load(sites + f * 5) + t
            y = turned(y, p, cos, sin, turn, live, c, True, DIM, HALF)
    place(plane, slot, c, y, BLOCK_TOKENS, HEADS, HEAD, KIND, HAS_WIDE, HAS_NARROW)


@triton.jit
def moments(
    planes, frames, slots, layers, sites, cos, sin, means, spreads, bad,
    KV: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    KIND: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HAS_WIDE: tl.constexpr,
    HAS_NARROW: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of a row, planes of the largest frame, frames). Tokens are read TOGETHER, but
    added one after another: the order of a float sum is part of it."""
    f, q = tl.program_id(2), tl.program_id(1)
    layer, span = layers_of(frames + f * 6)
    if q >= span * KV:
        return
    CHANNELS: tl.constexpr = HEADS * HEAD
    rows = tl.load(frames + f * 6 + 3)
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    plane = planes + ((q // span) * layers + layer + q % span) * 6
    first = tl.load(sites + f * 5)
    total = tl.zeros((1, WIDTH), tl.float64)
    square = tl.zeros((1, WIDTH), tl.float64)
    origin = tl.zeros((1, WIDTH), tl.float64)
    worst = tl.zeros((1, WIDTH), tl.int32)
    start = rows - rows
    while start < rows:
        for i in tl.static_range(TOGETHER):
            t = start + i + tl.arange(0, 1)
            y = turned_back(
                plane, slots_of(frames + f * 6, slots, t), c, cos, sin, first + t, q < span,
                BLOCK_TOKENS, HEADS, HEAD, KIND, DIM, HALF, HAS_WIDE, HAS_NARROW,
            )  # fmt: skip
            worst = tl.maximum(worst, y.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            wide = y.to(tl.float64)
            origin = tl.where((t == 0)[:, None], wide, origin)
            d = tl.where((t < rows)[:, None], wide - origin, 0.0)
            total += d
            square += d * d
        start += TOGETHER
    if tl.max(tl.max(worst, 1), 0) >= _INFINITE:
        tl.store(bad + f, 1)
    count = tl.maximum(rows, 1).to(tl.float64)
    mean = total / count
    spread = tl.maximum(square / count - mean * mean, 0.0)
    row = tl.load(sites + f * 5 + 1 + q // span) + q % span
    at = row * CHANNELS + c[None, :]
    tl.store(means + at, mean + origin, mask=c[None, :] < CHANNELS)
    tl.store(spreads + at, spread, mask=c[None, :] < CHANNELS)
