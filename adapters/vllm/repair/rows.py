"""Rows of vLLM's cache by token slot, read and written by the same copies as stores and retrieves.

For proofs and probes, which look at few rows: they go through memory of the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tierloom.stages.errors import LayoutError
from tierloom.stages.kv import paged_copy as copy
from tierloom.stages.kv.layout import KVLayout
from tierloom.stages.memory.arena import Arena
from tierloom.triton_kernels.memory.tables import PLACED, FrameTable


class Rows:
    """At most `tokens` rows of at most `layers` layers at a time; a context that owns its memory.

    Used by one thread, the one that launches what writes the cache.
    """

    def __init__(self, group: Any, tokens: int, layers: int) -> None:
        """Raises what page-locking memory for a device raises."""
        self._layout: KVLayout = group.layout
        self._table = group.layout.planes(group.caches)
        geometry = group.layout.geometry(native=False)
        self._arena = Arena(geometry.frame_bytes(layers, tokens) + (1 << 16), huge_pages=False)
        if self._layout.device != "cpu":
            self._arena.pin(self._layout.device)
        self._lease = self._arena.lease(geometry.frame_bytes(layers, tokens))

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._lease.release()
        self._arena.close()

    def read(self, slots: npt.NDArray[np.int64], layers: range) -> torch.Tensor:
        """[K and V, layers, slots, heads, channels], the caller's own, in the cache's dtype."""
        self._copy(slots, layers, gather=True)
        return self._view(len(slots), layers).clone()

    def fill(self, slots: npt.NDArray[np.int64], layers: range, value: float) -> None:
        """Set each element of these rows to `value`."""
        self._view(len(slots), layers).fill_(value)
        self._copy(slots, layers, gather=False)

    def _view(self, tokens: int, layers: range) -> torch.Tensor:
        shape = (2, len(layers), tokens, self._layout.heads, self._layout.dim)
        nbytes = self._layout.geometry(native=False).frame_bytes(len(layers), tokens)
        raw = torch.frombuffer(self._lease.view[:nbytes], dtype=torch.uint8)
        return raw.view(getattr(torch, self._layout.dtype)).view(shape)

    def _copy(self, slots: npt.NDArray[np.int64], layers: range, *, gather: bool) -> None:
        """Between the cache and our memory; the device has finished when it returns."""
        device, rows = self._layout.device, np.array([len(slots)], np.int32)
        nbytes = self._layout.geometry(native=False).frame_bytes(len(layers), len(slots))
        frames = FrameTable(
            address=np.array([self._lease.at(0, nbytes)], np.int64),
            nbytes=np.array([nbytes], np.int64),
            layer=np.array([[layers.start, layers.stop]], np.int32), rows=rows, take=rows.copy(),
            slot0=np.zeros(1, np.int64), checksum=np.zeros(1, np.uint64),
            status=np.zeros(1, np.uint8),
        )  # fmt: skip
        checked = self._layout.check_slots(slots, len(slots))
        stop, after = np.zeros(1, np.uint8), copy.fence(device)
        if gather:
            copy.gather_now(self._table, frames, checked, stop, device, after)
        else:
            copy.scatter_now(self._table, frames, checked, stop, device, after, verify=False)
        if frames.status[0] != PLACED:
            raise LayoutError(f"{self._layout.order}: rows were not copied")
