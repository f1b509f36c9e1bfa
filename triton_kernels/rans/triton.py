"""The rANS streams of `rans_format` on a GPU: a program codes one stream, a warp for its lanes.

Three launches encode: each stream into a scratch of its own, from the end downwards, for its
length is not known before; a sum of the lengths; and a copy that closes the gaps. Two decode.
The words of one step are ranked by a ballot: one reduction gathers a bit of each lane, and
counting bits gives every lane its place and the step its length, where a prefix sum would take
as many shuffles as log2(lanes), and its sum another reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from tierloom.triton_kernels.memory.machine_code import settle_triton
from tierloom.triton_kernels.rans.format import BAD, DONE, INITIAL_STATE, StreamGrid
from tierloom.triton_kernels.rans.tables import ENCODE_ROW, UNCODABLE, RansTables

settle_triton()

_START = tl.constexpr(INITIAL_STATE)
_DONE, _BAD = tl.constexpr(DONE), tl.constexpr(BAD)
_UNCODABLE, _ENCODE_ROW = tl.constexpr(UNCODABLE), tl.constexpr(ENCODE_ROW)
_COMPACT_WORDS = 4096
_RUNTIME = ["tokens", "channels", "rounds", "tables", "symbols_of_table", "room", "size"]
"""Not specialised: another number of tokens must not compile a kernel beside a running engine."""


@dataclass(frozen=True, slots=True)
class DeviceTables:
    """`RansTables` on a device; made once per set of tables, it owns its tensors."""

    bits: int
    freq_cdf: torch.Tensor
    """uint32 [K, NS]."""
    encode: torch.Tensor
    """int64 [K, ENCODE_ROW], the bits of the uint64 entries."""
    decode: torch.Tensor
    """uint8 [K, 2^bits]."""

    @classmethod
    def of(cls, tables: RansTables, device: torch.device | str) -> DeviceTables:
        """Copies the tables to the device, and waits for the copy."""
        arrays = (tables.freq_cdf, tables.encode.view(np.int64), tables.decode)
        return cls(tables.bits, *(torch.from_numpy(array).to(device) for array in arrays))


def launch_encode_streams(
    grid: StreamGrid,
    tables: DeviceTables,
    symbols: torch.Tensor,
    tabid: torch.Tensor,
    words: torch.Tensor,
    counts: torch.Tensor,
    states: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Enqueue what `rans_cpu.encode_streams` does, on contiguous tensors of one device.

    Nothing is waited for, so the number of words is in `counts`. A scratch of
    ``2 * grid.streams * grid.stream_words(bits)`` bytes comes from torch's allocator. The caller
    owns all tensors and keeps them until the kernels are done. Raises ValueError for shapes that
    are not the grid's, for more than 65535 planes, and for 2^31 words or more.
    """
    _require(grid, words, symbols, tabid, counts, states, status)
    room = -(-grid.stream_words(tables.bits) // 8) * 8
    scratch = torch.empty(max(8, grid.streams * room), dtype=torch.uint16, device=symbols.device)
    rans_encode[(grid.groups, grid.planes)](
        *(symbols, tabid, tables.encode, scratch, counts, states, status),
        *(grid.tokens, grid.channels, grid.rounds, len(tables.encode), room),
        LANES=grid.lanes,
        BITS=tables.bits,
        num_warps=1,
        enable_fp_fusion=False,
    )
    pieces = max(1, triton.cdiv(room, _COMPACT_WORDS))
    rans_compact[(grid.streams, pieces)](
        *(scratch, counts, _ends(counts), words, status, room, words.numel()),
        WORDS=_COMPACT_WORDS,
        num_warps=4,
        enable_fp_fusion=False,
    )


def launch_decode_streams(
    grid: StreamGrid,
    tables: DeviceTables,
    words: torch.Tensor,
    counts: torch.Tensor,
    states: torch.Tensor,
    tabid: torch.Tensor,
    symbols: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Enqueue what `rans_cpu.decode_streams` does, on contiguous tensors of one device.

    It promises the same of hostile bytes. Nothing is waited for; ownership and errors are as in
    `launch_encode_streams`.
    """
    _require(grid, words, symbols, tabid, counts, states, status)
    rans_decode[(grid.groups, grid.planes)](
        *(words, counts, _ends(counts), states, tabid, tables.freq_cdf, tables.decode),
        *(symbols, status, grid.tokens, grid.channels, grid.rounds),
        *(tables.freq_cdf.shape[0], tables.freq_cdf.shape[1], words.numel()),
        LANES=grid.lanes,
        BITS=tables.bits,
        num_warps=1,
        enable_fp_fusion=False,
    )


def _require(
    grid: StreamGrid,
    words: torch.Tensor,
    symbols: torch.Tensor,
    tabid: torch.Tensor,
    counts: torch.Tensor,
    states: torch.Tensor,
    status: torch.Tensor,
) -> None:
    grid.require(symbols=symbols.shape, tabid=tabid.shape, counts=counts.shape)
    grid.require(states=states.shape, status=status.shape)
    if grid.planes > 65535 or words.numel() >= 1 << 31:
        raise ValueError(f"{grid.planes} planes, {words.numel()} words: too many for a launch")


def _ends(counts: torch.Tensor) -> torch.Tensor:
    """int64 [streams]: where each stream's words end."""
    return counts.reshape(-1).to(torch.int64).cumsum(0)


@triton.jit(do_not_specialize=_RUNTIME)
def rans_encode(
    symbols,
    tabid,
    table,
    scratch,
    counts,
    states,
    status,
    tokens,
    channels,
    rounds,
    tables,
    room,
    LANES: tl.constexpr,
    BITS: tl.constexpr,
):
    """One program encodes one stream into the end of its `room` words. Grid: (groups, planes)."""
    plane = tl.program_id(1).to(tl.int64)
    stream = plane * tl.num_programs(0) + tl.program_id(0)
    lane = tl.arange(0, LANES)
    first = tl.program_id(0) * LANES * rounds + lane
    tabid += plane * channels
    known = _most_table(tabid, first, channels, rounds, LANES) < tables
    end = scratch + (stream + 1) * room
    x = tl.full((LANES,), _START, tl.uint32)
    seen = tl.zeros((LANES,), tl.uint32)
    # Of a lane without channel: frequency 2^BITS, which changes no state and emits nothing.
    IDLE: tl.constexpr = (1 << BITS) | ((1 << (32 - BITS)) << 32)
    n = 0
    r = rounds - 1
    row = symbols + (plane * tokens + tokens - 1) * channels
    step = tl.where(known, tokens * rounds, 0)
    while step > 0:
        c = first + r * LANES
        live = c < channels
        k = tl.load(tabid + c, mask=live, other=0).to(tl.int32)
        s = tl.load(row + c, mask=live, other=0).to(tl.int32)
        wide = tl.load(table + k * _ENCODE_ROW + s, mask=live, other=IDLE)
        e = wide.to(tl.uint32)
        seen |= e
        f = e & 0x7FFF
        full = (x >> (32 - BITS)) >= f
        ballot = _ballot(full, lane)
        n += _ones(ballot).to(tl.int32)
        rank = _ones(ballot & ((1 << lane.to(tl.uint32)) - 1)).to(tl.int32)
        tl.store(end - n + rank, x.to(tl.uint16), mask=full)
        x = tl.where(full, x >> 16, x)
        q = tl.umulhi(x, (wide >> 32).to(tl.uint32))
        rest = x - q * f
        short = rest >= f
        q = tl.where(short, q + 1, q)
        rest = tl.where(short, rest - f, rest)
        x = (q << BITS) + rest + (e >> 16)
        row = tl.where(r == 0, row - channels, row)
        r = tl.where(r == 0, rounds, r) - 1
        step -= 1
    tl.store(counts + stream, n)
    tl.store(states + stream * LANES + lane, x)
    lost = tl.max((seen & _UNCODABLE).to(tl.int32), 0)
    tl.store(status + stream, tl.where(known & (lost == 0), _DONE, _BAD))


@triton.jit(do_not_specialize=_RUNTIME)
def rans_compact(scratch, counts, ends, words, status, room, size, WORDS: tl.constexpr):
    """One program moves WORDS words of a stream where they belong. Grid: (streams, pieces)."""
    stream = tl.program_id(0).to(tl.int64)
    n = tl.load(counts + stream).to(tl.int32)
    end = tl.load(ends + stream)
    if end > size:  # there is no room, nor for any stream after it
        tl.store(status + stream, _BAD)
        n = 0
    i = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    word = tl.load(scratch + (stream + 1) * room - n + i, mask=i < n)
    tl.store(words + end - n + i, word, mask=i < n)


@triton.jit(do_not_specialize=_RUNTIME)
def rans_decode(
    words,
    counts,
    ends,
    states,
    tabid,
    freq_cdf,
    decode,
    symbols,
    status,
    tokens,
    channels,
    rounds,
    tables,
    symbols_of_table,
    size,
    LANES: tl.constexpr,
    BITS: tl.constexpr,
):
    """One program decodes one stream. Grid: (groups, planes)."""
    plane = tl.program_id(1).to(tl.int64)
    stream = plane * tl.num_programs(0) + tl.program_id(0)
    lane = tl.arange(0, LANES)
    first = tl.program_id(0) * LANES * rounds + lane
    tabid += plane * channels
    known = _most_table(tabid, first, channels, rounds, LANES) < tables
    streams = tl.num_programs(1).to(tl.int64) * tl.num_programs(0)
    known &= tl.load(ends + streams - 1) == size
    # If all counts add up to the words that there are, none of them leads outside.
    n = tl.where(known, tl.load(counts + stream), 0).to(tl.int32)
    words += tl.load(ends + stream) - n
    x = tl.load(states + stream * LANES + lane)
    at = 0
    r = 0
    row = symbols + plane * tokens * channels
    step = tl.where(known, tokens * rounds, 0)
    while step > 0:
        c = first + r * LANES
        live = c < channels
        k = tl.load(tabid + c, mask=live, other=0).to(tl.int32)
        slot = x & ((1 << BITS) - 1)
        s = tl.load(decode + (k << BITS) + slot.to(tl.int32), mask=live, other=0)
        e = tl.load(freq_cdf + k * symbols_of_table + s.to(tl.int32), mask=live, other=1 << BITS)
        tl.store(row + c, s, mask=live)
        x = (e & 0xFFFF) * (x >> BITS) + slot - (e >> 16)
        needy = (x < _START) & live
        ballot = _ballot(needy, lane)
        rank = at + _ones(ballot & ((1 << lane.to(tl.uint32)) - 1)).to(tl.int32)
        word = tl.load(words + rank, mask=needy & (rank < n), other=0)
        x = tl.where(needy, (x << 16) | word.to(tl.uint32), x)
        at += _ones(ballot).to(tl.int32)
        r += 1
        row = tl.where(r == rounds, row + channels, row)
        r = tl.where(r == rounds, 0, r)
        step -= 1
    off = tl.max((x != _START).to(tl.int32), 0)
    good = known & (at == n) & (off == 0)
    tl.store(status + stream, tl.where(good, _DONE, _BAD))


@triton.jit
def _most_table(tabid, first, channels, rounds, LANES: tl.constexpr):
    """The largest table id of a stream's channels."""
    most = tl.zeros((LANES,), tl.int32)
    r = 0
    while r < rounds:
        c = first + r * LANES
        most = tl.maximum(most, tl.load(tabid + c, mask=c < channels, other=0).to(tl.int32))
        r += 1
    return tl.max(most, 0)


@triton.jit
def _ballot(flag, lane):
    """uint32: bit j is lane j's flag; at most 32 lanes."""
    return tl.sum(flag.to(tl.uint32) << lane.to(tl.uint32), 0)


@triton.jit
def _ones(x):
    """Bits set in each uint32, in the form that LLVM knows for a population count."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24
