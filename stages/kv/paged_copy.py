"""The device's copy between the engine's cache and host memory, and what it must wait for.

The only file that chooses between the numba kernels (CPU) and the Triton ones (CUDA). On CUDA the
kernels read and write the page-locked arena directly, so frames need no staging buffer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tierloom.stages.kv.geometry import DTYPES
from tierloom.stages.memory.device_queue import Mark, queue_of
from tierloom.stages.memory.page_lock import is_locked
from tierloom.triton_kernels.blend.turns import TurnTable
from tierloom.triton_kernels.memory.tables import CORRUPT, PLACED, FrameTable, PlaneTable

Slots = npt.NDArray[np.int64]
Stop = npt.NDArray[np.uint8]


def fence(device: str) -> Any:
    """What a copy must wait for before it touches the engine's memory on `device`; called by the
    engine's thread, which does not wait for it. None on a CPU, where work is done when a call
    returns."""
    if device == "cpu":
        return None
    import torch

    return torch.cuda.current_stream(device).record_event()


def gather_now(
    table: PlaneTable, frames: FrameTable, slots: Slots, stop: Stop, device: str, after: Any = None
) -> None:
    """The gather and the checksums, finished when it returns. Nothing is validated."""
    if device == "cpu":
        from tierloom.triton_kernels.paged_copy.cpu import gather_frames

        gather_frames(table, frames, slots, stop)
    else:
        launch_gather(table, frames, slots, device, after).wait()
        end_gather(frames)


def launch_gather(
    table: PlaneTable, frames: FrameTable, slots: Slots, device: str, after: Any
) -> Mark:
    """A device's gather, behind the event `after`. `end_gather` is due when the mark is passed."""
    return _launch(table, frames, slots, device, after, gather=True)


def end_gather(frames: FrameTable) -> None:
    """The checksums of what a device has gathered."""
    from tierloom.triton_kernels.checksum.xxh3_cpu import xxh3_64

    for i in range(len(frames)):
        frames.checksum[i] = xxh3_64(frames.address[i], frames.nbytes[i])
    frames.status[:] = PLACED


def scatter_now(
    table: PlaneTable,
    frames: FrameTable,
    slots: Slots,
    stop: Stop,
    device: str,
    after: Any = None,
    *,
    verify: bool,
    turn: TurnTable | None = None,
) -> None:
    """The scatter of frames whose checksums are right, finished when it returns. `turn`: how far
    their K turns on its way."""
    if device == "cpu":
        if turn is None:
            from tierloom.triton_kernels.paged_copy.cpu import scatter_frames

            scatter_frames(table, frames, slots, stop, verify=verify)
        else:
            from tierloom.triton_kernels.blend.cpu import scatter_turned_frames

            scatter_turned_frames(table, frames, slots, stop, turn, verify=verify)
    else:
        launch_scatter(table, frames, slots, device, after, verify=verify, turn=turn).wait()
        end_scatter(frames)


def launch_scatter(
    table: PlaneTable, frames: FrameTable, slots: Slots, device: str, after: Any, *, verify: bool,
    turn: TurnTable | None,
) -> Mark:  # fmt: skip
    """Verify frames, and begin a device's scatter of the good ones, behind the event `after`.
    `end_scatter` is due when the mark is passed."""
    from tierloom.triton_kernels.checksum.xxh3_cpu import xxh3_64

    good = np.ones(len(frames), bool)
    for i in range(len(frames) if verify else 0):
        good[i] = xxh3_64(frames.address[i], frames.nbytes[i]) == frames.checksum[i]
    frames.take[~good] = 0  # nothing of a bad frame is placed
    frames.status[~good] = CORRUPT
    return _launch(table, frames, slots, device, after, gather=False, turn=turn)


def end_scatter(frames: FrameTable) -> None:
    """Say which frames a device has placed."""
    frames.status[frames.status != CORRUPT] = PLACED


def attention_now(
    table: PlaneTable, layer: int, slots: Slots, queries: Any, context: int, device: str, *,
    scale: float,
) -> npt.NDArray[np.float32]:  # fmt: skip
    """[context]: the share of attention that a prompt's last tokens pay in `layer` to each token
    before them; maximum over heads. `slots` of all of the prompt's tokens, -1 where no row is in
    place. `queries` [<= 64, heads, dim] of its last ones, turned, in K's dtype, on `device`. On the
    engine's own stream; waits for it. Nothing is validated."""
    import torch

    positions = torch.arange(len(slots) - len(queries), len(slots))
    if device == "cpu":
        from tierloom.triton_kernels.blend.probe_cpu import probe_scores

        found = probe_scores(table, layer, slots, queries, positions, context, scale=scale)
    else:
        from tierloom.triton_kernels.blend.probe_triton import launch_probe_scores
        from tierloom.triton_kernels.memory.launch import on_device
        from tierloom.triton_kernels.paged_copy.triton import DevicePlanes

        with torch.cuda.device(device):
            planes, places = DevicePlanes.of(table, device), on_device(slots, device)
            found = launch_probe_scores(
                planes, layer, places, queries, positions.to(device), context, scale=scale
            )
    scores: npt.NDArray[np.float32] = found.cpu().numpy()
    return scores


def warm_up(device: str, turning: str = "") -> None:
    """Compile the CPU kernels, or load them from numba's cache, before a request waits for it.
    `turning`: dtype of K that will be turned as well."""
    if device == "cpu":
        n = np.zeros(0, np.int64)
        table = PlaneTable(n, np.zeros((0, 4), np.int64), 1, 1, 1, 1, 1)
        i, layer = np.zeros(0, np.int32), np.zeros((0, 2), np.int32)
        frames = FrameTable(n, n, layer, i, i, n, np.zeros(0, np.uint64), np.zeros(0, np.uint8))
        stop = np.zeros(1, np.uint8)
        gather_now(table, frames, n, stop, device)
        scatter_now(table, frames, n, stop, device, verify=True)
        if turning:
            size = DTYPES[turning]
            table = PlaneTable(n, np.zeros((0, 4), np.int64), 1, 1, 1, 2, size)
            angle = np.zeros((0, 1, 1), np.float32)
            turn = TurnTable(i, i, angle, angle, 0, interleaved=False, dtype=turning)
            scatter_now(table, frames, n, stop, device, verify=True, turn=turn)


def _launch(
    table: PlaneTable, frames: FrameTable, slots: Slots, device: str, after: Any, *, gather: bool,
    turn: TurnTable | None = None,
) -> Mark:  # fmt: skip
    """One Triton launch on a stream of ours, after the engine's event `after`. Any thread."""
    from tierloom.triton_kernels.memory.launch import on_device
    from tierloom.triton_kernels.paged_copy.triton import (
        DeviceFrames,
        DevicePlanes,
        launch_paged_copy,
    )

    if not is_locked(frames.address, frames.nbytes):  # the engine would lose its device
        raise RuntimeError(f"{device} was handed memory of the host that is not page-locked")

    def launch() -> Any:
        planes, rows = DevicePlanes.of(table, device), DeviceFrames.of(frames, device)
        places = on_device(slots, device)
        if turn is None:
            launch_paged_copy(planes, rows, places, gather=gather)
            return planes, rows, places
        from tierloom.triton_kernels.blend.triton import DeviceTurns, launch_scatter_turned

        turns = DeviceTurns.of(turn, table, device)
        launch_scatter_turned(planes, rows, places, turns)
        return planes, rows, places, turns

    return queue_of(device, "gather" if gather else "scatter").launch(after, launch)
