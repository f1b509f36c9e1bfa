"""What a launch needs besides its kernel: tables on the device, tile and warp choices.

The choices are a table by vendor and row, never an autotuner: that would compile and time
several variants on the engine's GPU at its first request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton

from tierloom.triton_kernels.memory.machine_code import settle_triton

if TYPE_CHECKING:
    import numpy.typing as npt


settle_triton()


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program moves."""

    rows: int
    """Rows: a power of two."""
    nbytes: int
    """Bytes of each row: a power of two, at least 8."""
    warps: int


_PROGRAM_BYTES = {"cuda": 16384, "hip": 16384}
"""In flight per program of 4 warps: one covers a multiprocessor's share of latency times
bandwidth (18 KB on H100), and registers leave room for four."""
_NARROW_BYTES = 4096
"""Element by element, every piece needs an address of its own in registers: more would spill."""
_ROW_BYTES = 2048
"""Longer rows are cut here: wider tiles gain nothing, and waste more of a row's last tile."""


def tile_for(vendor: str, row_bytes: int, *, narrow: bool) -> Tile:
    """The tile for rows of `row_bytes`, some of which are `narrow` (go element by element).

    The interpreter pays per operation and not per byte, hence its huge tile.
    """
    if vendor == "interpreter":
        return Tile(rows=256, nbytes=triton.next_power_of_2(max(row_bytes, 8)), warps=4)
    nbytes = min(_ROW_BYTES, triton.next_power_of_2(max(row_bytes, 16)))
    program = _NARROW_BYTES if narrow else _PROGRAM_BYTES[vendor]
    return Tile(rows=program // nbytes, nbytes=nbytes, warps=4)


def vendor_of(device: torch.device) -> str:
    """Whose GPU: "cuda" or "hip"; tensors on a CPU can only be for the interpreter."""
    if device.type != "cuda":
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def on_device(table: npt.NDArray[Any], device: torch.device | str) -> torch.Tensor:
    """A copy of `table` on the device, ordered on the current stream; nothing waits for it."""
    host = torch.from_numpy(table)
    if torch.device(device).type != "cuda":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)  # pageable memory would be waited for
