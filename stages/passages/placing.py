"""Frames to other places than they were captured at: which rows, and how far K turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.contract.request import Request
from tierloom.stages.contract.stage import Context
from tierloom.stages.kv.rope import turns
from tierloom.triton_kernels.blend.turns import TurnTable
from tierloom.triton_kernels.memory.tables import FrameTable


def excerpt_rows(
    request: Request, frames: FrameTable, chunks: Sequence[Chunk], many: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Slots for frames of excerpts, `many[i]` of each chunk; `frames.slot0` then says where a
    frame's begin. Rows in front of an excerpt have none, nor what is computed anyway."""
    out = request.blend.left_out() if request.blend is not None else None
    rows, first, at = [], [], 0
    for chunk in chunks:
        assert chunk.excerpt is not None
        here = slice(chunk.start, chunk.start + chunk.wanted)
        slots = request.memory.slots[here]
        if out is not None:
            slots = np.where(out[here], -1, slots)
        rows += [np.full(chunk.excerpt.first, -1, np.int64), slots]
        first.append(at)
        at += chunk.excerpt.first + chunk.wanted
    frames.slot0[:] = np.repeat(first, many)
    return np.concatenate(rows)


def turn_table(ctx: Context, chunks: Sequence[Chunk], many: Sequence[int]) -> TurnTable:
    """How far K of each frame turns. What stands where it was captured is copied as it is."""
    rotation = ctx.rotation
    assert rotation is not None, "lookup plans no excerpt without a rotation"
    shifts = np.array([c.excerpt.shift if c.excerpt is not None else 0 for c in chunks], np.int64)
    distinct, row = np.unique(shifts, return_inverse=True)
    cos, sin = turns(rotation, distinct)
    row = np.where(shifts == 0, -1, row.reshape(shifts.shape)).astype(np.int32)
    return TurnTable(
        frame=np.repeat(row, many), kind=rotation.kind, cos=cos, sin=sin, first=rotation.first,
        interleaved=rotation.interleaved, dtype=ctx.geometry.dtype,
    )  # fmt: skip
