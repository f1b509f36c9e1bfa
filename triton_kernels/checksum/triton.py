"""The device's frame check: positional sums, which need no order among threads.

Over a frame's 32-bit little-endian words w (the last one zero-padded): the sums of w[i] and of
w[i] * (i + 1), mod 2^64. They see any changed word, and words swapped or shifted. A frame's
stored checksum is XXH3-64, which is serial: this one only tells two copies of a frame apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

from tierloom.triton_kernels.memory.machine_code import compiled, settle_triton
from tierloom.triton_kernels.memory.raw import load8, load32

if TYPE_CHECKING:
    import numpy.typing as npt

settle_triton()

_QUADS = 256
_STEPS = 8


@compiled(nogil=True)
def positional_sums_cpu(
    address: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64], sums: npt.NDArray[np.uint64]
) -> None:
    """Fill `sums`, uint64 [frames, 2], for the frames at `address` int64 [frames]."""
    for f in range(len(address)):
        at = np.uint64(address[f])
        words = nbytes[f] // 4
        plain = weighted = np.uint64(0)
        for i in range(words):
            word = load32(at + np.uint64(4 * i))
            plain += word
            weighted += word * np.uint64(i + 1)
        for i in range(words * 4, nbytes[f]):
            word = load8(at + np.uint64(i)) << np.uint64(8 * (i % 4))
            plain += word
            weighted += word * np.uint64(words + 1)
        sums[f, 0], sums[f, 1] = plain, weighted


def launch_positional_sums(
    address: torch.Tensor,
    nbytes: torch.Tensor,
    largest: int,
    *,
    quads: int = _QUADS,
    steps: int = _STEPS,
) -> torch.Tensor:
    """Enqueue the sums of a batch on the current stream; a new int64 [frames, 2] of their bits.

    `address` and `nbytes` are int64 [frames] on the device, addresses multiples of 16 bytes;
    `largest` is the greatest of `nbytes`, known to the host, so that nothing has to wait.
    """
    sums = torch.zeros(len(address), 2, dtype=torch.int64, device=address.device)
    if len(address):
        grid = (max(1, triton.cdiv(largest, 16 * quads * steps)), len(address))
        positional_sums[grid](
            *(address, nbytes, sums),
            QUADS=quads,
            STEPS=steps,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return sums


@triton.jit
def positional_sums(address, nbytes, sums, QUADS: tl.constexpr, STEPS: tl.constexpr):
    """One program adds QUADS * STEPS * 16 bytes of one frame. Grid: (programs, frames)."""
    f = tl.program_id(1)
    size = tl.load(nbytes + f)
    words = tl.multiple_of(tl.load(address + f).to(tl.pointer_type(tl.uint32)), 16)
    lane = tl.arange(0, 4)[None, :]
    plain = tl.zeros((QUADS, 4), tl.int64)
    weighted = tl.zeros((QUADS, 4), tl.int64)
    for step in range(STEPS):
        # The mask is by quads, so that it does not break up their 128-bit loads.
        quad = (tl.program_id(0).to(tl.int64) * STEPS + step) * QUADS + tl.arange(0, QUADS)
        i = quad[:, None] * 4 + lane
        word = tl.load(words + i, mask=(quad < size // 16)[:, None], other=0).to(tl.int64)
        plain += word
        weighted += word * (i + 1)
    total, weighted_total = tl.sum(plain), tl.sum(weighted)
    if tl.program_id(0) == 0:
        j = tl.arange(0, 16)
        at = size // 16 * 16 + j
        data = tl.load(words.to(tl.pointer_type(tl.uint8)) + at, mask=at < size, other=0)
        word = data.to(tl.int64) << ((j % 4) * 8).to(tl.int64)
        total += tl.sum(word)
        weighted_total += tl.sum(word * (at // 4 + 1))
    tl.atomic_add(sums + f * 2, total, sem="relaxed")
    tl.atomic_add(sums + f * 2 + 1, weighted_total, sem="relaxed")
