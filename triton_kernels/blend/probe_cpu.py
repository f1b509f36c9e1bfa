"""torch and numba: what a prompt's last tokens attend to, the twin of `probe_triton.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tierloom.triton_kernels.blend.reference import paid_to
from tierloom.triton_kernels.memory.tables import FrameTable, PlaneTable
from tierloom.triton_kernels.paged_copy.cpu import gather_frames

if TYPE_CHECKING:
    import numpy.typing as npt


def probe_scores(
    planes: PlaneTable, layer: int, slots: npt.NDArray[np.int64], queries: torch.Tensor,
    positions: torch.Tensor, context: int, *, scale: float,
) -> torch.Tensor:  # fmt: skip
    """float32 [context]: the share of attention on the first `context` tokens that falls on each,
    summed over `queries`; maximum over heads (ProphetKV, arXiv 2602.02579, chooses by the like).

    `slots` [tokens] of the tokens at positions 0, 1, ...; -1: none is there. `queries` [<= 64,
    heads, dim], turned, in K's dtype, see the tokens up to their `positions` (int64). `scale`: of
    the logits. `layer` is K's plane. Nothing is validated or written; the result is the caller's.
    """
    one = slice(layer, layer + 1)
    table = PlaneTable(
        planes.base[one], planes.stride[one], 1, planes.block_tokens, planes.heads, planes.dim,
        planes.itemsize,
    )  # fmt: skip
    rows = np.array([len(slots)], np.int32)
    keys = torch.empty(len(slots), planes.heads, planes.dim, dtype=queries.dtype)
    frames = FrameTable(
        np.array([keys.data_ptr()], np.int64), np.array([keys.nbytes], np.int64),
        np.array([[0, 1]], np.int32), rows, rows, np.zeros(1, np.int64), np.zeros(1, np.uint64),
        np.zeros(1, np.uint8),
    )  # fmt: skip
    gather_frames(table, frames, slots, np.zeros(1, np.uint8), checksum=False)
    here = torch.from_numpy(slots >= 0)
    return paid_to(queries.float(), keys.float(), positions, here, context, scale)
