"""A request's frames between its cache and leases: frame tables, the guarded copy, and the joining
of a chunk that comes in parts with what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.contract.request import EngineMemory
from tierloom.stages.contract.stage import UnderWay
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.kv.paged_copy import gather_now, launch_gather, launch_scatter, scatter_now
from tierloom.stages.memory.device_queue import Mark
from tierloom.triton_kernels.blend.turns import TurnTable
from tierloom.triton_kernels.memory.tables import PLACED, FrameTable, PlaneTable


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


def gather(memory: EngineMemory, frames: FrameTable, device: str) -> Mark | None:
    """Fill frames from the engine's cache and write their checksums; `is_whole` says whether it
    came to its end. A mark: a device does it, and `end_gather` writes the checksums afterwards.

    A caller who cancels waits for it, and so never shares its memory with us.
    """
    if device == "cpu":
        with memory.in_use:
            if not memory.stop[0] and memory.table is not None:
                gather_now(memory.table, frames, memory.slots, memory.stop, device, memory.event)
        return None
    return _launched(
        memory, lambda table: launch_gather(table, frames, memory.slots, device, memory.event)
    )


def is_whole(memory: EngineMemory, frames: FrameTable) -> bool:
    """All frames were filled. What was cancelled meanwhile is not whole: a device goes on to the
    end, over memory that may have changed."""
    return not memory.stop[0] and bool((frames.status == PLACED).all())


def scatter(
    memory: EngineMemory, frames: FrameTable, device: str, *, verify: bool,
    slots: npt.NDArray[np.int64] | None = None, turn: TurnTable | None = None,
) -> Mark | None:  # fmt: skip
    """Verify frames and place their rows; `frames.status` says how far it came. A mark: a device
    does it, and `end_scatter` says so afterwards. `slots`, `turn`: of frames that were captured
    elsewhere, whose K turns on its way."""
    rows = memory.slots if slots is None else slots
    if device == "cpu":
        with memory.in_use:
            if not memory.stop[0] and memory.table is not None:
                scatter_now(
                    memory.table, frames, rows, memory.stop, device, memory.event, verify=verify,
                    turn=turn,
                )  # fmt: skip
        return None
    return _launched(
        memory,
        lambda table: launch_scatter(
            table, frames, rows, device, memory.event, verify=verify, turn=turn
        ),
    )


def _launched(memory: EngineMemory, launch: Callable[[PlaneTable], Mark]) -> Mark | None:
    """Launch a copy, unless the request was cancelled. The memory is in use until its mark is
    passed, when the caller must leave it."""
    assert memory.launches is not None
    with memory.launches.beginning, ExitStack() as inside:
        inside.enter_context(memory.in_use)
        if memory.stop[0] or memory.table is None:
            return None
        mark = launch(memory.table)
        memory.launches.add(mark)
        inside.pop_all()
        return mark


def wait_for(memory: EngineMemory, begun: Sequence[UnderWay]) -> None:
    """Until a device is through with copies, of which nothing is to come."""
    for mark in (mark for each in begun for mark in each.marks):
        try:
            mark.wait()
        finally:
            memory.in_use.leave()


def can_join(head: Header, whole: Header, tokens: int) -> bool:
    """Whether the first `tokens` tokens of an object can be the beginning of another."""
    same = (
        head.geometry == whole.geometry and head.group == whole.group and not whole.geometry.native
    )
    return same and head.tokens >= tokens and not any(f.codecs for f in head.frames)


def join(geometry: Geometry, chunk: Chunk, head: Object, frames: range, tokens: int) -> bool:
    """Copy the first `tokens` tokens of `frames` from `head` into the chunk's object and put their
    new checksums into `chunk.checksums`; False where a frame of `head` is damaged.

    Both leases are held by the caller. Blocks; frees the GIL while it copies.
    """
    from tierloom.triton_kernels.checksum.xxh3_cpu import xxh3_64

    whole = chunk.object
    assert whole is not None
    assert chunk.checksums is not None
    base = head.lease.at(0, head.header.nbytes)
    source = frame_table(geometry, [(chunk, head.header, base, frames, tokens)])
    slots = np.arange(chunk.start + tokens) - chunk.start
    stop = np.zeros(1, np.uint8)
    scatter_now(_planes(geometry, whole), source, slots, stop, "cpu", verify=True)
    at = whole.lease.at(0, whole.header.nbytes)
    for i in frames:
        frame = whole.header.frames[i]
        chunk.checksums[i] = xxh3_64(at + frame.offset, frame.stored)
    return bool((source.status == PLACED).all())


def _planes(g: Geometry, whole: Object) -> PlaneTable:
    """An object's frames as if they were an engine's cache of one block."""
    header, start = whole.header, whole.lease.at(0, whole.header.nbytes)
    plane = header.tokens * g.row_bytes
    base = np.empty((g.kv, g.layers), np.int64)
    for i, frame in enumerate(header.frames):
        first = i * header.group
        layers = min(header.group, g.layers - first)
        here = start + frame.offset + plane * np.arange(g.kv * layers).reshape(g.kv, layers)
        base[:, first : first + layers] = here
    step = [plane, g.row_bytes, g.dim * g.itemsize, g.itemsize]
    stride = np.tile(np.array(step, np.int64), (g.kv * g.layers, 1))
    return PlaneTable(base.reshape(-1), stride, g.kv, header.tokens, g.heads, g.dim, g.itemsize)
