"""The layout's self-test: a pattern through gather and scatter, on the engine's own tensors.

It compares with plain indexing of the tensors, which knows nothing of pointers and strides. What
it writes it puts back, so it runs before the first request and needs no memory of its own in the
engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..triton_kernels.planes import PLACED, FrameTable
from . import copy
from .arena import Arena
from .errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from .layout import KVLayout


def token(layout: KVLayout, layer: Any, kv: int, slot: int) -> torch.Tensor:
    """The [heads, dim] view of one token in one layer's K (0) or V (1), by plain indexing."""
    block, at = divmod(slot, layout.block_tokens)
    match layout.order:
        case "2BNHD":
            view = layer[kv, block, at]
        case "B2NHD":
            view = layer[block, kv, at]
        case "2BHND":
            view = layer[kv, block, :, at]
        case "B2HND":
            view = layer[block, kv, :, at]
        case "BNHD":
            view = layer[kv][block, at]
        case "BHND":
            view = layer[kv][block, :, at]
        case "SHD":
            view = layer[kv][slot]
        case "BND":
            view = layer[block, at].unsqueeze(0)
        case "BHNC":
            view = layer[block, :, at, kv * layout.dim : (kv + 1) * layout.dim]
        case "BHNC-KT":
            flat = layer[block].reshape(layout.heads, 2, -1)[:, kv]
            shape = (
                (layout.dim, layout.block_tokens) if kv == 0 else (layout.block_tokens, layout.dim)
            )
            inner = flat.reshape(layout.heads, *shape)
            view = inner[:, :, at] if kv == 0 else inner[:, at]
        case other:
            raise LayoutError(f"no self-test for order {other}")
    return view  # type: ignore[no-any-return]


def check_layout(layout: KVLayout, caches: Sequence[Any], *, native: bool) -> None:
    """Raise LayoutError unless the kernels and plain indexing agree on `caches`.

    The slots it uses (the first and last block's) hold what they held before when it returns.
    """
    size = layout.block_tokens
    blocks = sorted({0, layout.blocks - 1})
    slots = np.array([b * size + t for b in blocks for t in range(size)], np.int64)
    if not native:  # a few tokens of each prove as much as all of them
        slots = slots[np.unique(np.linspace(0, len(slots) - 1, 8).astype(int))]
    before = _bytes(layout, caches, slots)
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 256, before.shape, np.uint8)
    arena = Arena(2 * before.nbytes + (1 << 16), huge_pages=False)
    lease = arena.lease(before.nbytes)
    try:
        _write(layout, caches, slots, pattern)
        if not np.array_equal(_bytes(layout, caches, slots), pattern):
            raise LayoutError(f"{layout.order}: two slots share memory")
        frames = _frame(layout, lease.address, len(slots), native=native)
        table = layout.planes(caches, native=native)
        rows = layout.block_rows(slots) if native else slots
        stop, device = np.zeros(1, np.uint8), layout.device
        copy.gather_now(table, frames, rows, stop, device, copy.fence(device))
        _write(layout, caches, slots, before)
        copy.scatter_now(table, frames, rows, stop, device, copy.fence(device), verify=True)
        if frames.status[0] != PLACED:
            raise LayoutError(f"{layout.order}: a frame did not survive in memory")
        if not np.array_equal(_bytes(layout, caches, slots), pattern):
            raise LayoutError(
                f"{layout.order}: what was gathered and scattered is not what was written"
            )
        flat = np.frombuffer(lease.view, np.uint8)[: pattern.nbytes].reshape(pattern.shape)
        if not native and not np.array_equal(flat, pattern):
            raise LayoutError(f"{layout.order}: gathered bytes are not in canonical order")
        del flat  # a view of the arena, which is about to go
    finally:
        _write(layout, caches, slots, before)
        lease.release()
        arena.close()


def _bytes(
    layout: KVLayout, caches: Sequence[Any], slots: Any
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[kv, layers, tokens, row bytes] by plain indexing."""
    import torch

    rows = [
        token(layout, layer, kv, int(s)).contiguous().view(torch.uint8).cpu().numpy().reshape(-1)
        for kv in range(layout.kv)
        for layer in caches
        for s in slots
    ]
    return np.stack(rows).reshape(layout.kv, layout.layers, len(slots), -1).copy()


def _write(layout: KVLayout, caches: Sequence[Any], slots: Any, rows: Any) -> None:
    import torch

    for kv in range(layout.kv):
        for i, layer in enumerate(caches):
            for j, s in enumerate(slots):
                view = token(layout, layer, kv, int(s))
                plain = torch.from_numpy(rows[kv, i, j].copy()).view(view.dtype).reshape(view.shape)
                view.copy_(plain)


def _frame(layout: KVLayout, address: int, tokens: int, *, native: bool) -> FrameTable:
    """All layers as one frame."""
    geometry = layout.geometry(native=native)
    rows = geometry.rows(tokens)
    nbytes = geometry.frame_bytes(layout.layers, tokens)
    return FrameTable(
        address=np.array([address], np.int64),
        nbytes=np.array([nbytes], np.int64),
        layer=np.array([[0, layout.layers]], np.int32),
        rows=np.array([rows], np.int32),
        take=np.array([rows], np.int32),
        slot0=np.zeros(1, np.int64),
        checksum=np.zeros(1, np.uint64),
        status=np.zeros(1, np.uint8),
    )
