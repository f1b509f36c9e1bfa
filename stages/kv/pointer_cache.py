"""The last pointer table, kept: an engine passes the same tensors with every request.

Checking shape, stride and dtype of 64 tensors costs the engine's thread some 200 us; seeing that
they are the same objects at the same addresses costs a tenth of that.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from tierloom.stages.kv.layout import KVLayout
from tierloom.triton_kernels.memory.tables import PlaneTable


class PointerCache:
    """Remembers one table; holds no tensor alive. Used by the engine's threads, without a lock:
    what they race for is one tuple."""

    def __init__(self) -> None:
        self._last: tuple[KVLayout, bool, list[Any], list[int], PlaneTable] | None = None

    def of(self, layout: KVLayout, caches: Sequence[Any], *, native: bool) -> PlaneTable:
        """`layout.planes(caches)`, checked when the tensors are not those of the last call."""
        flat = [t for c in caches for t in (c if isinstance(c, (tuple, list)) else (c,))]
        last = self._last
        if last is not None and last[0] == layout and last[1] == native:
            known, at = last[2], last[3]
            if len(known) == len(flat) and all(
                ref() is t and ptr == t.data_ptr()
                for ref, ptr, t in zip(known, at, flat, strict=True)
            ):
                return last[4]
        table = layout.planes(caches, native=native)
        refs = [weakref.ref(t) for t in flat]
        self._last = (layout, native, refs, [t.data_ptr() for t in flat], table)
        return table
