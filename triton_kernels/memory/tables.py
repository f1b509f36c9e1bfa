"""What a kernel must know of memory: pointer tables for the engine's cache and for frames.

Everything is addresses and byte strides, so one kernel serves every layout and every layer in
one launch. Nothing here owns memory: whoever builds a table keeps its tensors and leases alive
until the kernel that reads it has finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

PENDING, PLACED, CORRUPT = 0, 1, 2
"""States of a frame after a copy: not reached (stopped), copied, checksum did not match."""


@dataclass(frozen=True, slots=True)
class PlaneTable:
    """The engine's cache as planes: one row per (K or V, layer), plane = kv * layers + layer.

    The element (token slot s, head h, channel d) of plane p lies at
    ``base[p] + (s // block_tokens) * stride[p, 0] + (s % block_tokens) * stride[p, 1]
    + h * stride[p, 2] + d * stride[p, 3]`` (bytes).
    """

    base: npt.NDArray[np.int64]
    """[planes] addresses (host, or device for the Triton kernels)."""
    stride: npt.NDArray[np.int64]
    """[planes, 4] bytes: block, token in block, head, channel."""
    kv: int
    """Planes per layer: 2 for K and V, 1 for MLA's latent or for opaque native blocks."""
    block_tokens: int
    heads: int
    dim: int
    """Channels per head, counted in elements of `itemsize` bytes."""
    itemsize: int
    """Bytes per element: 1, 2, 4 or 8."""

    @classmethod
    def of_blocks(
        cls, base: npt.NDArray[np.int64], step: int, block_bytes: int, kv: int
    ) -> PlaneTable:
        """Blocks as opaque rows, `step` bytes apart: slots are then block ids (native order)."""
        stride = np.tile(np.array([step, 0, block_bytes, 1], np.int64), (len(base), 1))
        return cls(base, stride, kv, block_tokens=1, heads=1, dim=block_bytes, itemsize=1)

    @property
    def layers(self) -> int:
        return len(self.base) // self.kv

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one plane."""
        return self.heads * self.dim * self.itemsize


@dataclass(frozen=True, slots=True)
class FrameTable:
    """A batch of frames, each ``[kv, layers of the group, rows, heads, dim]`` and contiguous.

    A frame may hold more rows than are copied: retrieving part of a chunk places only the
    first `take` of them, and `rows` still sets the distance between its planes.
    """

    address: npt.NDArray[np.int64]
    """[frames] where each frame starts."""
    nbytes: npt.NDArray[np.int64]
    """[frames] bytes the checksum covers: all of the frame's stored bytes."""
    layer: npt.NDArray[np.int32]
    """[frames, 2] first layer, and one past the last."""
    rows: npt.NDArray[np.int32]
    """[frames] rows that the frame holds."""
    take: npt.NDArray[np.int32]
    """[frames] rows to copy, at most `rows`."""
    slot0: npt.NDArray[np.int64]
    """[frames] where this frame's slots begin in the slot list."""
    checksum: npt.NDArray[np.uint64]
    """[frames] xxh3-64 of the frame: written by gather, compared by scatter."""
    status: npt.NDArray[np.uint8]
    """[frames] PENDING, PLACED or CORRUPT: written by the kernel, frame by frame."""

    def __len__(self) -> int:
        return len(self.address)
