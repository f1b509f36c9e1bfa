"""Between the engine's cache and leases: frame tables out of pieces, and the device's copy.

The only file that chooses between the numba kernels (CPU) and the Triton ones (CUDA). On CUDA the
kernels read and write the page-locked arena directly, so frames need no staging buffer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..triton_kernels.planes import CORRUPT, PLACED, FrameTable, PlaneTable
from .page_lock import is_locked

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from .geometry import Geometry
    from .object import Header
    from .payload import Piece
    from .ticket import Ticket

    Slots = npt.NDArray[np.int64]
    Stop = npt.NDArray[np.uint8]


def frame_table(
    geometry: Geometry, jobs: Sequence[tuple[Piece, Header, int, range, int]]
) -> FrameTable:
    """A row per frame of each job: (piece, header, address of its object, frames, tokens)."""
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
        slot0=np.array([p.start // geometry.block_tokens for p, *_ in jobs]).repeat(many),
        checksum=np.array([f.checksum for _, f in table], np.uint64),
        status=np.zeros(len(table), np.uint8),
    )


def gather(ticket: Ticket, frames: FrameTable, device: str) -> bool:
    """Fill frames from the ticket's cache and write their checksums; False: stopped half way.

    A caller who gives up waits for it, and so never shares its memory with us. What was given up
    meanwhile is not whole: a device goes on to the end, over memory that may have changed.
    """
    with ticket.touching:
        if not ticket.stop[0] and ticket.table is not None:
            gather_now(ticket.table, frames, ticket.slots, ticket.stop, device, ticket.fence)
    return not ticket.stop[0] and bool((frames.status == PLACED).all())


def scatter(ticket: Ticket, frames: FrameTable, device: str, *, verify: bool) -> None:
    """Verify frames and place their rows; `frames.status` says how far it came."""
    with ticket.touching:
        if not ticket.stop[0] and ticket.table is not None:
            scatter_now(
                ticket.table, frames, ticket.slots, ticket.stop, device, ticket.fence, verify=verify
            )


def fence(device: str) -> Any:
    """What a copy must wait for before it touches the engine's memory on `device`; called by the
    engine's thread, which does not wait for it. None on a CPU, where work is done when a call
    returns."""
    if device == "cpu":
        return None
    import torch

    return torch.cuda.current_stream(device).record_event()


def gather_now(
    table: PlaneTable,
    frames: FrameTable,
    slots: Slots,
    stop: Stop,
    device: str,
    behind: Any = None,
) -> None:
    """The device's gather and the checksums, finished when it returns. Nothing is validated."""
    if device == "cpu":
        from ..triton_kernels.paged_copy_cpu import gather_frames

        gather_frames(table, frames, slots, stop)
        return
    from ..triton_kernels.xxh3 import xxh3_64

    _launch(table, frames, slots, device, behind, gather=True)
    for i in range(len(frames)):
        frames.checksum[i] = xxh3_64(frames.address[i], frames.nbytes[i])
    frames.status[:] = PLACED


def scatter_now(
    table: PlaneTable,
    frames: FrameTable,
    slots: Slots,
    stop: Stop,
    device: str,
    behind: Any = None,
    *,
    verify: bool,
) -> None:
    """The device's scatter of frames whose checksums are right, finished when it returns."""
    if device == "cpu":
        from ..triton_kernels.paged_copy_cpu import scatter_frames

        scatter_frames(table, frames, slots, stop, verify=verify)
        return
    from ..triton_kernels.xxh3 import xxh3_64

    good = np.ones(len(frames), bool)
    for i in range(len(frames) if verify else 0):
        good[i] = xxh3_64(frames.address[i], frames.nbytes[i]) == frames.checksum[i]
    frames.take[~good] = 0  # nothing of a bad frame is placed
    _launch(table, frames, slots, device, behind, gather=False)
    frames.status[:] = np.where(good, PLACED, CORRUPT)


def warm_up(device: str) -> None:
    """Compile the CPU kernels, or load them from numba's cache, before a request waits for it."""
    if device == "cpu":
        n = np.zeros(0, np.int64)
        table = PlaneTable(n, np.zeros((0, 4), np.int64), 1, 1, 1, 1, 1)
        i, layer = np.zeros(0, np.int32), np.zeros((0, 2), np.int32)
        frames = FrameTable(n, n, layer, i, i, n, np.zeros(0, np.uint64), np.zeros(0, np.uint8))
        stop = np.zeros(1, np.uint8)
        gather_now(table, frames, n, stop, device)
        scatter_now(table, frames, n, stop, device, verify=True)


def _launch(
    table: PlaneTable, frames: FrameTable, slots: Slots, device: str, behind: Any, *, gather: bool
) -> None:
    """One Triton launch on a side stream, behind the engine's event `behind`; waits for it.

    Any thread, whatever device is current there. To enter the stream alone would do, but leaving it
    would make a context on the device that was current before: half a GiB of another worker's.
    """
    import torch

    from ..triton_kernels.launch import on_device
    from ..triton_kernels.paged_copy import DeviceFrames, DevicePlanes, launch_paged_copy

    if not is_locked(frames.address, frames.nbytes):  # the engine would lose its device
        raise RuntimeError(f"{device} was handed memory of the host that is not page-locked")
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        try:
            if behind is not None:
                stream.wait_event(behind)
            with torch.cuda.stream(stream):
                launch_paged_copy(
                    DevicePlanes.of(table, device), DeviceFrames.of(frames, device),
                    on_device(slots, device), gather=gather,
                )  # fmt: skip
        finally:  # whatever happens, nothing of it is under way when this returns
            stream.synchronize()
