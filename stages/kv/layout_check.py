"""The layout's self-test: noise through gather and scatter, in memory of our own that is laid out
like the engine's.

It compares with plain indexing of tensors, which knows nothing of pointers and strides. The
engine's own tensors are not touched: requests may be using them by then.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tierloom.stages.errors import LayoutError
from tierloom.stages.kv import paged_copy as copy
from tierloom.stages.kv.layout import PAIRS, KVLayout
from tierloom.stages.memory.arena import Arena
from tierloom.triton_kernels.memory.tables import PLACED, FrameTable

Bytes = npt.NDArray[np.uint8]

log = logging.getLogger("tierloom")

_FEW = 2
"""Layers, and blocks of each, that stand for all of them."""
_STEP = 256
"""Elements by which addresses are moved, so that they stay as aligned as they were."""


class SelfTests:
    """Which layouts have been tested. Thread-safe: each kind once, and whoever asks meanwhile waits
    for what comes of it."""

    def __init__(self, *, native: bool) -> None:
        self._native = native
        self._passed: set[KVLayout] = set()
        self._failed: str | None = None
        self._running = threading.Lock()

    def failure(self, layout: KVLayout) -> str | None:
        """Why nothing may be kept, if this layout or one before it fails; None: all is well."""
        with self._running:
            if self._failed is None:
                try:
                    kind = fewer(layout)
                    if kind not in self._passed:
                        check_layout(kind, native=self._native)
                        self._passed.add(kind)
                except Exception as error:  # no memory on the device, no compiler for a kernel
                    known = isinstance(error, LayoutError)
                    self._failed = str(error) if known else f"the self-test broke: {error!r}"
                    log.error("caching is off: %s", self._failed, exc_info=not known)  # noqa: TRY400
            return self._failed


def fewer(layout: KVLayout) -> KVLayout:
    """The same layout of a few layers and blocks; what is left the same of two layouts is all that
    kernels depend on.

    Strides stay what they are, but for the way from K to V where all blocks lie between them.
    Raises LayoutError where two slots share memory.
    """
    letters = layout.order.removesuffix("-KT")
    size = dict(zip(letters, layout.shape, strict=True))
    step = dict(zip(letters, layout.stride, strict=True))
    blocks = min(_FEW, layout.blocks)
    few = size | {"B": blocks, "S": blocks * layout.block_tokens}
    inner: list[str] = []
    for c in sorted(letters, key=lambda c: step[c]):
        if size[c] > 1 and step[c] < _reach((size[i], step[i]) for i in inner):
            raise LayoutError(f"{layout.order}: two slots share memory, strides: {layout.stride}")
        if c == "2" and "B" in inner:
            gap = step[c] - _reach((few[i], step[i]) for i in inner)
            step[c] -= gap // _STEP * _STEP
        inner.append(c)
    return replace(
        layout, layers=min(_FEW, layout.layers), blocks=blocks,
        shape=tuple(few[c] for c in letters), stride=tuple(step.values()),
    )  # fmt: skip


def look_alike(layout: KVLayout, memory: torch.Tensor) -> list[Any]:
    """Tensors in `memory` that `layout` describes. uint8, `memory_of(layout)` bytes."""
    apart, _ = _apart(layout)
    flat = memory.view(getattr(torch, layout.dtype))
    made = [
        flat.as_strided(layout.shape, layout.stride, i * apart) for i in range(_tensors(layout))
    ]
    return list(zip(made[::2], made[1::2], strict=True)) if layout.order in PAIRS else made


def memory_of(layout: KVLayout) -> int:
    """Bytes that `look_alike` needs."""
    return _apart(layout)[1] * layout.geometry(native=False).itemsize


def _apart(layout: KVLayout) -> tuple[int, int]:
    """Elements from one tensor to the next, and of all of them. They lie in one another's gaps
    where they fit, as those of an engine do that keeps the layers of a block together."""
    dims = sorted(zip(layout.stride, layout.shape, strict=True))
    reach = _reach((n, s) for s, n in dims)
    apart = -(-_reach((n, s) for s, n in dims[:-1]) // _STEP) * _STEP
    if apart * _tensors(layout) > dims[-1][0]:
        apart = -(-reach // _STEP) * _STEP
    total = apart * (_tensors(layout) - 1) + reach
    return apart, total


def _tensors(layout: KVLayout) -> int:
    return layout.layers * (2 if layout.order in PAIRS else 1)


def _reach(dims: Iterable[tuple[int, int]]) -> int:
    """Elements from the first to the last of a tensor of these (sizes, strides)."""
    return 1 + sum((size - 1) * step for size, step in dims)


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


def check_layout(layout: KVLayout, *, native: bool) -> None:
    """Raise LayoutError unless the kernels and plain indexing agree on memory laid out like this.

    Of a large cache a few layers and blocks are imitated. What is gathered must be what was
    written, and what is scattered must be in place and nothing else changed.
    """
    layout, rng = fewer(layout), np.random.default_rng(0)

    def noise() -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(rng.bytes(memory_of(layout)), np.uint8).copy())

    first, second = noise(), noise()
    was, wanted = look_alike(layout, first), look_alike(layout, second)
    slots = np.arange(layout.blocks * layout.block_tokens)
    if not native:  # a few tokens prove as much as all of them
        slots = slots[np.unique(np.linspace(0, len(slots) - 1, 8).astype(int))]
    memory = first.clone().to(layout.device)
    table = layout.planes(look_alike(layout, memory), native=native)
    rows = layout.block_rows(slots) if native else slots
    stop, device = np.zeros(1, np.uint8), layout.device
    nbytes = layout.geometry(native=native).frame_bytes(layout.layers, len(slots))
    arena = Arena(2 * nbytes + (1 << 16), huge_pages=False)
    try:
        if device != "cpu":
            arena.pin(device)
        lease = arena.lease(nbytes)
        try:
            frames = _frame(layout, lease.address, len(slots), native=native)
            copy.gather_now(table, frames, rows, stop, device, copy.fence(device))
            gathered = bytes(lease.view[:nbytes])
            memory.copy_(second)
            copy.scatter_now(table, frames, rows, stop, device, copy.fence(device), verify=True)
        finally:
            lease.release()
    finally:
        arena.close()
    if frames.status[0] != PLACED:
        raise LayoutError(f"{layout.order}: a frame did not survive in memory")
    if not native and gathered != _bytes(layout, was, slots).tobytes():
        raise LayoutError(f"{layout.order}: gathered bytes are not in canonical order")
    _copy(layout, was, wanted, None if native else slots)
    if not torch.equal(memory.cpu(), second):
        raise LayoutError(
            f"{layout.order}: what was gathered and scattered is not what was written"
        )


def _bytes(layout: KVLayout, caches: Sequence[Any], slots: Any) -> Bytes:
    """[kv, layers, tokens, row bytes] by plain indexing."""
    rows = [
        token(layout, layer, kv, int(s)).contiguous().view(torch.uint8).numpy().reshape(-1)
        for kv in range(layout.kv)
        for layer in caches
        for s in slots
    ]
    return np.stack(rows).reshape(layout.kv, layout.layers, len(slots), -1)


def _copy(layout: KVLayout, source: Sequence[Any], target: Sequence[Any], slots: Any) -> None:
    """These tokens by plain indexing; None: all there is."""
    for one, other in zip(source, target, strict=True):
        if slots is None:
            for a, b in zip(one, other, strict=True):
                b.copy_(a)
            continue
        for kv in range(layout.kv):
            for s in slots:
                token(layout, other, kv, int(s)).copy_(token(layout, one, kv, int(s)))


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
