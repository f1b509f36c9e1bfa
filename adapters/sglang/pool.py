"""SGLang's pools of KV pages, on the host and on the device, as a layout and its tensors.

Every layout that keeps a token's heads, or a latent, in one piece becomes views of the pool's own
memory: nothing is copied to read it. Other pools (a window's, a state's, an indexer's) are taken as
bytes: a page is what SGLang's own `get_page_buffer_meta` says it is.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from tierloom.stages.errors import LayoutError
from tierloom.stages.kv.layout import KVLayout


class Pages(NamedTuple):
    """A pool's pages. The tensors are views; the pool owns the memory."""

    layout: KVLayout
    caches: list[Any]
    tokens: int
    """Tokens of a page; 1 where a page is bytes."""
    slots: int
    """Slots by which SGLang names a page."""

    @property
    def nbytes(self) -> int:
        """Of one page."""
        g = self.layout.geometry(native=False)
        return g.frame_bytes(g.layers, self.tokens)


def host_pages(pool: Any) -> Pages:
    """The KV pages of a host pool of SGLang's. Raises LayoutError for a pool whose layout is not
    known, or is not what SGLang itself says."""
    buffer, page = getattr(pool, "kv_buffer", None), int(pool.page_size)
    if not isinstance(buffer, torch.Tensor):
        raise LayoutError(
            f"{type(pool).__name__} keeps K and V in {type(buffer).__name__}, not in one tensor"
        )
    try:
        view = _VIEWS[pool.layout]
    except KeyError:
        raise LayoutError(
            f"--hicache-mem-layout {pool.layout} is not known here; known: {', '.join(_VIEWS)}"
        ) from None
    paired = hasattr(pool, "v_head_dim")
    if paired and pool.v_head_dim != pool.head_dim:
        raise LayoutError(f"K has {pool.head_dim} channels and V {pool.v_head_dim}")
    parts = (buffer[0], buffer[1]) if paired else (buffer,)
    try:
        layers: list[Any] = [
            tuple(view(part, i, page) for part in parts) for i in range(pool.layer_num)
        ]
    except (IndexError, RuntimeError) as error:
        raise LayoutError(
            f"{type(pool).__name__} of shape {tuple(buffer.shape)} is not {pool.layout}: {error}"
        ) from error
    if not paired:  # a latent: one head
        layers = [latent.squeeze(2) for (latent,) in layers]
    order = ("BHND" if pool.layout == "page_head" else "BNHD") if paired else "BND"
    found = Pages(KVLayout.from_tensors(layers, order=order), layers, page, page)
    _prove(pool, found)
    return found


def device_pages(pool: Any, page: int) -> Pages:
    """The KV pages of a device pool of SGLang's, of `page` tokens. Raises LayoutError."""
    if latents := getattr(pool, "kv_buffer", None):
        layers: list[Any] = [_by_page(t, page).squeeze(2) for t in latents]
        order = "BND"
    else:
        keys, values = getattr(pool, "k_buffer", None), getattr(pool, "v_buffer", None)
        if not keys or not values:
            raise LayoutError(f"{type(pool).__name__} has neither K and V nor latents by layer")
        if any(t.ndim != 3 for t in (*keys, *values)):
            raise LayoutError(
                f"K of {type(pool).__name__} is {tuple(keys[0].shape)}: tokens, heads, channels "
                "are known (SGLANG_USE_HND_KVCACHE and other orders are not)"
            )
        layers = [(_by_page(k, page), _by_page(v, page)) for k, v in zip(keys, values, strict=True)]
        order = "BNHD"
    return Pages(KVLayout.from_tensors(layers, order=order), layers, page, page)


def opaque_pages(pool: Any) -> list[Pages]:
    """The pages of any host pool, as bytes in SGLang's own order: one `Pages` for each distance
    between the parts of two pages. Raises LayoutError where pages are not evenly spaced."""
    page = int(getattr(pool, "page_size", 1) or 1)
    count = int(pool.size) // page
    starts, sizes = _regions(pool, 0, page)
    second, _ = _regions(pool, 1, page)
    last, _ = _regions(pool, count - 1, page)
    steps = [b - a for a, b in zip(starts, second, strict=True)]
    even = [a + s * (count - 1) for a, s in zip(starts, steps, strict=True)]
    if count < 2 or even != last or min(steps) <= 0:
        raise LayoutError(f"{type(pool).__name__}: its {count} pages are not evenly spaced")
    found = []
    for step in sorted(set(steps)):
        parts = [(a, n) for a, n, s in zip(starts, sizes, steps, strict=True) if s == step]
        unit = math.gcd(*(n for _, n in parts))
        views = []
        for start, size in parts:
            memory = (ctypes.c_uint8 * (step * (count - 1) + size)).from_address(start)
            whole = torch.from_numpy(np.ctypeslib.as_array(memory))
            views += [
                whole[at:].as_strided((count, 1, unit), (step, unit, 1))
                for at in range(0, size, unit)
            ]
        found.append(Pages(KVLayout.from_tensors(views, order="BND"), views, 1, page))
    return found


def page_numbers(indices: torch.Tensor, page: int, pages: int) -> list[int] | None:
    """The pages that token slots `indices` (int64, `pages` times `page` of them) fill; None where
    they are not whole pages, each from its first token on."""
    slots = indices.detach().to("cpu").numpy().astype(np.int64, copy=False).reshape(-1)
    if len(slots) != page * pages:
        return None
    first = slots[::page]
    if (first % page).any() or (slots.reshape(-1, page) != first[:, None] + np.arange(page)).any():
        return None
    numbers: list[int] = (first // page).tolist()
    return numbers


def _by_page(t: Any, page: int) -> Any:
    """[tokens, heads, channels] as [pages, tokens of a page, heads, channels], in place."""
    whole = t[: t.shape[0] // page * page]
    return whole.unflatten(0, (whole.shape[0] // page, page))


_VIEWS: dict[str, Callable[[Any, int, int], Any]] = {
    "layer_first": lambda t, layer, page: _by_page(t[layer], page),
    "page_first": lambda t, layer, page: _by_page(t[:, layer], page),
    "page_first_direct": lambda t, layer, page: t[:, layer],
    "page_head": lambda t, layer, page: t[:, :, :, layer],
}
"""One layer of a part (K, V or latents) of each `--hicache-mem-layout`, as pages."""


def _regions(pool: Any, page: int, tokens: int) -> tuple[list[int], list[int]]:
    """Where SGLang says a page lies: addresses and bytes of its parts."""
    slots = torch.arange(page * tokens, (page + 1) * tokens)
    starts, sizes = pool.get_page_buffer_meta(slots)
    return [int(s) for s in starts], [int(s) for s in sizes]


def _prove(pool: Any, found: Pages) -> None:
    """Raise LayoutError unless SGLang puts a page where we read it."""
    last = found.layout.blocks - 1
    starts, sizes = _regions(pool, last, found.slots)
    parts = [t for layer in found.caches for t in (layer if isinstance(layer, tuple) else (layer,))]
    ours = {t[last].data_ptr() for t in parts}
    if not set(starts) <= ours or sum(sizes) != found.nbytes:
        raise LayoutError(
            f"{type(pool).__name__} says that a page of {pool.layout} is {sum(sizes)} bytes in "
            f"{len(starts)} parts, where {found.nbytes} bytes were found elsewhere"
        )
