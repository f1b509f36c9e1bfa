"""Triton: what a prompt's last tokens attend to, over a layer's K where it lies in the cache.

Of each tile of keys the logarithm of a query's sum first, as flash attention's (Dao et al., arXiv
2205.14135) with keys split; then, with the sums of all tiles, what is paid to each key.
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

QUERIES, KEYS = 64, 64
"""Of a program; the first is the most that a call takes."""
WARPS = 8


def launch_probe_scores(
    planes: DevicePlanes, layer: int, slots, queries, positions, context: int, *, scale: float,
    keys: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """float32 [context]: as `probe_scores` of the CPU, whose arguments are here on the device.
    Enqueues; nothing is validated, nothing waits."""
    count, heads, dim = queries.shape
    tokens = len(slots)
    interpreted = vendor_of(slots.device) == "interpreter"
    keys = keys or (1024 if interpreted else KEYS)
    tiles = triton.cdiv(tokens, keys)
    sums = torch.empty(tiles, heads, QUERIES, device=slots.device)
    paid = sums.new_empty((heads, tokens))
    for first in (True, False):
        probe[(tiles, heads)](
            planes.table[layer], slots, queries.contiguous(), positions, sums, paid, tokens, count,
            scale, BLOCK_TOKENS=planes.block_tokens, HEADS=planes.heads, HEAD=planes.dim,
            WIDE=not planes.has_narrow, DIM=dim, GROUP=heads * dim // (planes.heads * planes.dim),
            WIDEN=interpreted and queries.dtype == torch.bfloat16,  # its dot would take bits
            SUMS=first, QUERIES=QUERIES, KEYS=keys, num_warps=WARPS,
        )  # fmt: skip
        sums = sums.logsumexp(0) if first else sums
    share = paid[:, :context]
    return (share / share.sum(1, keepdim=True).clamp(min=1e-30)).amax(0)


@triton.jit
def probe(
    plane, slots, queries, positions, sums, paid, tokens, count, scale,
    BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
    DIM: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr, SUMS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of keys, heads of queries)."""
    h = tl.program_id(1)
    i, t = tl.arange(0, QUERIES), tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    c = tl.arange(0, triton.next_power_of_2(DIM))
    mine = queries + (i * tl.num_programs(1) + h)[:, None] * DIM + c[None, :]
    query = tl.load(mine, mask=(i < count)[:, None] & (c < DIM)[None, :], other=0.0)
    slot = tl.load(slots + t, mask=t < tokens, other=-1)
    SIZE: tl.constexpr = query.dtype.primitive_bitwidth // 8
    at = cells(plane, slot, h // GROUP * DIM + c, BLOCK_TOKENS, HEADS, HEAD, SIZE, WIDE)
    bits = tl.load(at, mask=(slot >= 0)[:, None] & (c < DIM)[None, :], other=0)
    key = bits.to(query.dtype, bitcast=True)
    if WIDEN:
        query, key = query.to(tl.float32), key.to(tl.float32)
    s = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    position = tl.load(positions + i, mask=i < count, other=-1)
    seen = (slot >= 0)[None, :] & (t[None, :] <= position[:, None])
    s = tl.where(seen, s, float("-inf"))
    if SUMS:
        top = tl.max(s, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        own = (tl.program_id(0) * tl.num_programs(1) + h) * QUERIES + i
        total = tl.sum(tl.exp(s - top[:, None]), 1)
        some = tl.log(tl.where(total > 0, total, 1.0))
        tl.store(sums + own, tl.where(total > 0, top + some, float("-inf")))
    else:
        total = tl.load(sums + h * QUERIES + i)
        total = tl.where(total == float("-inf"), 0.0, total)
        part = tl.exp(s - total[:, None])
        tl.store(paid + h * tokens + t, tl.sum(part, 0), mask=t < tokens)
