"""Between the engine's cache and leases: frame tables out of pieces, and the device's copy.

The only file that chooses between the numba kernels (CPU) and the Triton ones (CUDA). On CUDA the
kernels read and write the page-locked arena directly, so frames need no staging buffer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..triton_kernels.planes import PLACED, FrameTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .layout import Geometry
    from .object import Header
    from .payload import Piece, Ticket


def frame_table(
    geometry: Geometry, jobs: Sequence[tuple[Piece, Header, int, range, int]]
) -> FrameTable:
    """A row per frame of each job (piece, header, address of its object, frames, tokens to copy).

    Built column by column: Python touches a job, not a frame.
    """
    n = sum(len(frames) for _, _, _, frames, _ in jobs)
    address, nbytes, slot0 = (np.empty(n, np.int64) for _ in range(3))
    layer, checksum = np.empty((n, 2), np.int32), np.empty(n, np.uint64)
    rows, take = np.empty(n, np.int32), np.empty(n, np.int32)
    at = 0
    for piece, header, base, frames, tokens in jobs:
        part = slice(at, at + len(frames))
        table = header.frames[frames.start : frames.stop]
        address[part] = [base + f.offset for f in table]
        nbytes[part] = [f.stored for f in table]
        checksum[part] = [f.checksum for f in table]
        first = np.arange(frames.start, frames.stop) * header.group
        layer[part, 0], layer[part, 1] = first, np.minimum(first + header.group, geometry.layers)
        rows[part] = geometry.rows(header.tokens)
        take[part] = geometry.rows(tokens)
        slot0[part] = piece.start // geometry.block_tokens
        at += len(frames)
    return FrameTable(address, nbytes, layer, rows, take, slot0, checksum, np.zeros(n, np.uint8))


def gather(ticket: Ticket, frames: FrameTable, device: str) -> bool:
    """Fill frames from the engine's cache and write their checksums; False: stopped half way.

    Holds the ticket's guard, so that a caller who gave up never shares its memory with us.
    """
    with ticket.guard:
        if ticket.stop[0] or ticket.table is None:
            return False
        if device == "cpu":
            from ..triton_kernels.paged_copy_cpu import gather_frames

            gather_frames(ticket.table, frames, ticket.slots, ticket.stop)
        else:
            from ..triton_kernels.paged_copy import gather_frames_cuda

            gather_frames_cuda(ticket.table, frames, ticket.slots)
    return bool((frames.status == PLACED).all())


def scatter(ticket: Ticket, frames: FrameTable, device: str, *, verify: bool) -> None:
    """Verify frames and place their rows; `frames.status` says how far it came."""
    with ticket.guard:
        if ticket.stop[0] or ticket.table is None:
            return
        if device == "cpu":
            from ..triton_kernels.paged_copy_cpu import scatter_frames

            scatter_frames(ticket.table, frames, ticket.slots, ticket.stop, verify)
        else:
            from ..triton_kernels.paged_copy import scatter_frames_cuda

            scatter_frames_cuda(ticket.table, frames, ticket.slots, verify)
