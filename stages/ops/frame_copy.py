"""A request's frames between its cache and leases: frame tables, and the guarded copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.contract.request import EngineMemory
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.object import Header
from tierloom.stages.kv.paged_copy import gather_now, scatter_now
from tierloom.triton_kernels.memory.tables import PLACED, FrameTable


def frame_table(
    geometry: Geometry, jobs: Sequence[tuple[Chunk, Header, int, range, int]]
) -> FrameTable:
    """A row per frame of each job: (chunk, header, address of its object, frames, tokens)."""
    many = [len(frames) for _, _, _, frames, _ in jobs]
    table = [(base, f) for _, h, base, part, _ in jobs for f in h.frames[part.start : part.stop]]
    first = [i * h.group for _, h, _, part, _ in jobs for i in part]
    group = np.repeat([h.group for _, h, _, _, _ in jobs], many)
    layer = np.empty((len(table), 2), np.int32)
    layer[:, 0] = first
    layer[:, 1] = np.minimum(layer[:, 0] + group, geometry.layers)
    return FrameTable(
        address=np.array([base + f.offset for base, f in table], np.int64),
        nbytes=np.array([f.stored for _, f in table], np.int64),
        layer=layer,
        rows=np.array([geometry.rows(h.tokens) for _, h, *_ in jobs], np.int32).repeat(many),
        take=np.array([geometry.rows(n) for *_, n in jobs], np.int32).repeat(many),
        slot0=np.array([c.start // geometry.block_tokens for c, *_ in jobs]).repeat(many),
        checksum=np.array([f.checksum for _, f in table], np.uint64),
        status=np.zeros(len(table), np.uint8),
    )


def gather(memory: EngineMemory, frames: FrameTable, device: str) -> bool:
    """Fill frames from the engine's cache and write their checksums; False: stopped half way.

    A caller who cancels waits for it, and so never shares its memory with us. What was cancelled
    meanwhile is not whole: a device goes on to the end, over memory that may have changed.
    """
    with memory.in_use:
        if not memory.stop[0] and memory.table is not None:
            gather_now(memory.table, frames, memory.slots, memory.stop, device, memory.event)
    return not memory.stop[0] and bool((frames.status == PLACED).all())


def scatter(memory: EngineMemory, frames: FrameTable, device: str, *, verify: bool) -> None:
    """Verify frames and place their rows; `frames.status` says how far it came."""
    with memory.in_use:
        if not memory.stop[0] and memory.table is not None:
            scatter_now(
                memory.table, frames, memory.slots, memory.stop, device, memory.event,
                verify=verify,
            )  # fmt: skip
