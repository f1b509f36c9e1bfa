"""Triton: numbers of `cachegen` as symbols of its tables, and back; see `cachegen_cpu`.

Frames as for `cachegen.py`: their addresses are those of arrays [kv * layers, rows, channels], each
on a multiple of 16 bytes, and `sites`, `tables` and `bad` mean what they mean there. Nothing is
validated, nothing waits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tierloom.triton_kernels.cachegen.cpu import CENTER, SYMBOLS
from tierloom.triton_kernels.memory.launch import vendor_of

_CENTRE, _SYMBOLS = tl.constexpr(CENTER), tl.constexpr(SYMBOLS)
_NEVER = tl.constexpr(1 << 54)
ELEMENTS = 2048
"""Of a program that makes symbols: 16 a thread."""


def launch_choose_tables(
    frames, sites, costs, tabid, *, kv: int, channels: int, width: int | None = None
) -> None:
    """The cheapest table of each channel of `frames`' q int16, into `tabid` uint8 [any, channels].

    `costs` is int32 [SYMBOLS, tables], turned round from `cachegen_cpu.choose_tables`, so that the
    costs of one symbol lie side by side; at most 256 tables. `width`: channels of a program.
    """
    tables = costs.shape[1]
    padded = triton.next_power_of_2(tables)
    width = width or (64 if vendor_of(costs.device) == "interpreter" else 16)
    choose_tables[(triton.cdiv(channels, width), frames.span * kv, len(frames.table))](
        frames.table, sites.table, costs, tabid, tables, kv,
        CHANNELS=channels, TABLES=padded, WIDTH=width, enable_fp_fusion=False,
    )  # fmt: skip


def launch_to_symbols(
    frames, to, sites, tables, *, kv: int, channels: int, shape: tuple[int, int] | None = None
) -> None:
    """q int16 of `frames` as symbols uint8 of the frames `to`, where `tables` are known by now.
    `shape`: rows and channels of a program."""
    width = min(512, max(16, triton.next_power_of_2(channels)))
    many = vendor_of(frames.table.device) == "interpreter"
    rows, width = shape or ((1 << 16) // width if many else ELEMENTS // width, width)
    tiles = triton.cdiv(frames.rows, rows) * triton.cdiv(channels, width)
    to_symbols[(tiles, frames.span * kv, len(frames.table))](
        *(frames.table, to.table, sites.table, *tables, kv),
        CHANNELS=channels, ROWS=rows, WIDTH=width, enable_fp_fusion=False,
    )  # fmt: skip


def launch_check_escapes(frames, sites, places, bad, *, kv: int, channels: int) -> None:
    """`bad` becomes 1 for frames whose escapes no encoder writes: places that do not ascend, or
    where the symbol is not an escape. Stricter than numba's `dequantize`, which takes any order
    within a row, and any symbol."""
    check_escapes[(len(frames.table),)](
        frames.table, sites.table, places, bad, kv,
        CHANNELS=channels, SIZE=1024, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def choose_tables(
    frames, sites, costs, tabid, tables, kv,
    CHANNELS: tl.constexpr, TABLES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of a row, planes of the largest frame, frames)."""
    f, q = tl.program_id(2), tl.program_id(1)
    span = tl.load(frames + f * 6 + 2) - tl.load(frames + f * 6 + 1)
    if q >= span * kv:
        return
    rows = tl.load(frames + f * 6 + 3)
    numbers = tl.multiple_of(tl.load(frames + f * 6).to(tl.pointer_type(tl.int16)), 16)
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    k = tl.arange(0, TABLES)
    inside = c < CHANNELS
    total = tl.zeros((WIDTH, TABLES), tl.int64)
    t = rows - rows
    while t < rows:
        n = tl.load(numbers + (q * rows + t) * CHANNELS + c, mask=inside, other=0).to(tl.int32)
        s = tl.minimum(tl.maximum(n + _CENTRE, 0), _SYMBOLS - 1)
        known = (k < tables)[None, :] & inside[:, None]
        total += tl.load(costs + s[:, None] * tables + k[None, :], mask=known, other=0)
        t += 1
    total = tl.where((k < tables)[None, :], total, _NEVER)
    best = tl.min(total * TABLES + k[None, :], 1) % TABLES  # the first of equals
    row = tl.load(sites + f * 5 + 1 + q // span) + q % span
    tl.store(tabid + row * CHANNELS + c, best.to(tl.uint8), mask=inside)


@triton.jit
def to_symbols(
    frames, to, sites, tabid, reach, places, values, found, kv,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles * tiles of a row, planes of the largest frame, frames)."""
    f, q = tl.program_id(2), tl.program_id(1)
    span = tl.load(frames + f * 6 + 2) - tl.load(frames + f * 6 + 1)
    if q >= span * kv:
        return
    TILES: tl.constexpr = (CHANNELS + WIDTH - 1) // WIDTH
    rows = tl.load(frames + f * 6 + 3)
    t = (tl.program_id(0) // TILES) * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(0) % TILES) * WIDTH + tl.arange(0, WIDTH)
    kept = (t < rows)[:, None] & (c < CHANNELS)[None, :]
    at = (q * rows + t)[:, None] * CHANNELS + c[None, :]
    q16 = tl.multiple_of(tl.load(frames + f * 6).to(tl.pointer_type(tl.int16)), 16)
    n = tl.load(q16 + at, mask=kept, other=0).to(tl.int32)
    own = (tl.load(sites + f * 5 + 1 + q // span) + q % span) * CHANNELS + c
    limit = tl.load(reach + tl.load(tabid + own, mask=c < CHANNELS, other=0).to(tl.int32))
    emit(
        tl.load(to + f * 6), n, at, kept, limit, places, values, found + f,
        tl.load(sites + f * 5 + 3), tl.load(sites + f * 5 + 4),
    )  # fmt: skip


@triton.jit
def check_escapes(frames, sites, places, bad, kv, CHANNELS: tl.constexpr, SIZE: tl.constexpr):
    """Grid: (frames,)."""
    f = tl.program_id(0)
    span = tl.load(frames + f * 6 + 2) - tl.load(frames + f * 6 + 1)
    size = span * kv * tl.load(frames + f * 6 + 3) * CHANNELS
    symbols = tl.load(frames + f * 6).to(tl.pointer_type(tl.uint8))
    places += tl.load(sites + f * 5 + 3)
    count = tl.load(sites + f * 5 + 4)
    start = count - count
    while start < count:
        i = start + tl.arange(0, SIZE)
        place = tl.load(places + i, mask=i < count, other=0).to(tl.int64)
        last = tl.load(places + i - 1, mask=(i > 0) & (i < count), other=0).to(tl.int64)
        wrong = ((place <= last) & (i > 0)) | (place >= size)
        symbol = tl.load(symbols + place, mask=(i < count) & (place < size), other=0)
        wrong = (wrong | (symbol != 0)) & (i < count)
        if tl.max(wrong.to(tl.int32), 0) > 0:
            tl.store(bad + f, 1)
        start += SIZE


@triton.jit
def emit(to, n, place, kept, limit, places, values, found, first, room):
    """Symbols of numbers at `place` after the address `to`; what is over `limit` becomes an
    escape: a rare thing, so that each may count itself."""
    over = (tl.abs(n) > limit[None, :]) & kept
    out = tl.multiple_of(to.to(tl.pointer_type(tl.uint8)), 16)
    tl.store(out + place, tl.where(over, 0, n + _CENTRE).to(tl.uint8), mask=kept)
    if tl.max(tl.max(over.to(tl.int32), 1), 0) > 0:
        nth = tl.atomic_add(found + tl.zeros_like(n), 1, mask=over, sem="relaxed")
        has_room = over & (nth < room)
        tl.store(places + first + nth, place.to(tl.uint32), mask=has_room)
        tl.store(values + first + nth, n, mask=has_room)


@triton.jit
def numbers(
    symbols, row, c, live, means, steps, places, values, count, CHANNELS: tl.constexpr
):  # fmt: skip
    """float32 [rows, channels] before they are turned; an escape's number is searched for."""
    inside = c < CHANNELS
    at = row[:, None] + c[None, :]
    mask = live[:, None] & inside[None, :]
    n = tl.load(symbols + at, mask=mask, other=_CENTRE).to(tl.int32)
    escaped = n == 0
    n -= _CENTRE
    if tl.max(tl.max(escaped.to(tl.int32), 1), 0) > 0:
        place = at.to(tl.uint32)
        low = tl.zeros_like(n)
        left = count.to(tl.int32)
        while left > 1:  # the last place that is not beyond this one
            half = left // 2
            probe = tl.load(places + low + half, mask=escaped, other=0)
            low = tl.where(probe <= place, low + half, low)
            left -= half
        known = escaped & (low < count)
        known = known & (tl.load(places + low, mask=known, other=0) == place)
        n = tl.where(known, tl.load(values + low, mask=known, other=0), n)
    step = tl.load(steps + c, mask=inside, other=0.0)
    mean = tl.load(means + c, mask=inside, other=0.0)
    return n.to(tl.float32) * step[None, :] + mean[None, :]
