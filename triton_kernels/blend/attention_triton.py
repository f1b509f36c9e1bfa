"""Triton: attention of some tokens of a context over all of its K and V, where they lie.

As flash attention does it (Dao et al., arXiv 2205.14135), with keys split among programs where
there are few queries, and the parts put together by the logarithms of their sums. The heads of
queries that share a head of K are rows of one tile, so that K is read once for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from tierloom.triton_kernels.memory.launch import vendor_of
from tierloom.triton_kernels.paged_copy.triton import cells

if TYPE_CHECKING:
    from tierloom.triton_kernels.paged_copy.triton import DevicePlanes

ROWS, KEYS, WARPS = 32, 32, 4
"""Of a program; larger tiles do not fit in the registers of all vendors."""
PROGRAMS = 264
"""Enough for two on each multiprocessor of an H100: keys are split until there are as many."""
LEAST = 256
"""Keys that a program has at least, where keys are split."""


def launch_blend_attention(
    planes: DevicePlanes, k: int, v: int, slots: torch.Tensor, queries: torch.Tensor,
    positions: torch.Tensor, *, scale: float, splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """[n, heads, dim] in queries' dtype: what `queries` [n, heads, dim], turned, get of the tokens
    up to their `positions` [n], int64.

    `slots` [tokens] of the tokens at positions 0, 1, ...; -1: none is there. `k` and `v` are the
    planes, in queries' dtype, and hold numbers up to the greatest position. Zero for a query that
    sees nothing. Enqueues; nothing is validated, nothing waits; the result is the caller's.
    """
    count, heads, dim = queries.shape
    kv_heads = planes.heads * planes.dim // dim
    group, tokens = heads // kv_heads, len(slots)
    interpreted = vendor_of(slots.device) == "interpreter"
    tiles = triton.cdiv(count * group, ROWS)
    if splits is None:
        splits = min(triton.cdiv(PROGRAMS, tiles * kv_heads), triton.cdiv(tokens, LEAST))
    part = triton.cdiv(triton.cdiv(tokens, splits), KEYS) * KEYS
    got = torch.empty(splits, count, heads, dim, device=slots.device)
    sums = got.new_empty((splits, count, heads))
    blend_attention[(tiles, splits, kv_heads)](
        planes.table[k], planes.table[v], slots, queries.contiguous(), positions, got, sums,
        tokens, count, part, scale, BLOCK_TOKENS=planes.block_tokens, HEADS=planes.heads,
        HEAD=planes.dim, WIDE=not planes.has_narrow, DIM=dim, GROUP=group,
        WIDEN=interpreted and queries.dtype == torch.bfloat16,  # its dot would take bits
        ROWS=ROWS, KEYS=KEYS, num_warps=WARPS,
    )  # fmt: skip
    share = sums.softmax(0).nan_to_num(0)  # where a query sees nothing, all sums are -inf
    return (got * share[..., None]).sum(0).to(queries.dtype)


@triton.jit
def blend_attention(
    keys, values, slots, queries, positions, got, sums, tokens, count, part, scale,
    BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
    DIM: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, parts of the keys, heads of K)."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.program_id(2)
    i, live = r // GROUP, r < count * GROUP
    row = i * (tl.num_programs(2) * GROUP) + h * GROUP + r % GROUP
    c = tl.arange(0, triton.next_power_of_2(DIM))
    wanted = live[:, None] & (c < DIM)[None, :]
    query = tl.load(queries + row[:, None] * DIM + c[None, :], mask=wanted, other=0.0)
    position = tl.load(positions + i, mask=live, other=-1)
    SIZE: tl.constexpr = query.dtype.primitive_bitwidth // 8
    DTYPE: tl.constexpr = query.dtype
    if WIDEN:
        query = query.to(tl.float32)
    first = tl.program_id(1) * part
    end = tl.minimum(tl.minimum(first + part, tokens), tl.max(position, 0).to(tl.int32) + 1)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, triton.next_power_of_2(DIM)], tl.float32)
    for at in tl.range(first, end, KEYS, num_stages=1):  # more are registers, too
        t = at + tl.arange(0, KEYS)
        slot = tl.load(slots + t, mask=t < end, other=-1)
        mask = (slot >= 0)[:, None] & (c < DIM)[None, :]
        there = cells(keys, slot, h * DIM + c, BLOCK_TOKENS, HEADS, HEAD, SIZE, WIDE)
        key = tl.load(there, mask=mask, other=0).to(DTYPE, bitcast=True)
        there = cells(values, slot, h * DIM + c, BLOCK_TOKENS, HEADS, HEAD, SIZE, WIDE)
        value = tl.load(there, mask=mask, other=0).to(DTYPE, bitcast=True)
        if WIDEN:
            key, value = key.to(tl.float32), value.to(tl.float32)
        s = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (slot >= 0)[None, :] & (t[None, :] <= position[:, None])
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - safe[:, None])
        fade = tl.exp(top - safe)
        total = total * fade + tl.sum(p, 1)
        out = out * fade[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        top = new
    some = tl.where(total > 0, total, 1.0)
    to = tl.program_id(1) * (count * tl.num_programs(2) * GROUP) + row
    tl.store(got + to[:, None] * DIM + c[None, :], out / some[:, None], mask=wanted)
    tl.store(sums + to, tl.where(total > 0, top + tl.log(some), float("-inf")), mask=live)
