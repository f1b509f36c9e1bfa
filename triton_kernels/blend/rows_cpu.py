"""A cache's rows side by side, for kernels on a CPU that read them as numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tierloom.triton_kernels.memory.tables import FrameTable
from tierloom.triton_kernels.paged_copy.cpu import gather_frames

if TYPE_CHECKING:
    import numpy.typing as npt

    from tierloom.triton_kernels.memory.tables import PlaneTable


def gathered(planes: PlaneTable, slots: npt.NDArray[np.int64], dtype: torch.dtype) -> torch.Tensor:
    """[planes, tokens, heads, dim] in `slots` [tokens], a copy; zero where a slot is -1. Nothing is
    validated."""
    rows = np.array([len(slots)], np.int32)
    size = (len(planes.base), len(slots), planes.heads, planes.dim)
    made = torch.empty(size, dtype=dtype)
    frames = FrameTable(
        np.array([made.data_ptr()], np.int64), np.array([made.nbytes], np.int64),
        np.array([[0, planes.layers]], np.int32), rows, rows, np.zeros(1, np.int64),
        np.zeros(1, np.uint64), np.zeros(1, np.uint8),
    )  # fmt: skip
    gather_frames(planes, frames, slots, np.zeros(1, np.uint8), checksum=False)
    return made
