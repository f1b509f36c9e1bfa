"""Caches in every layout that engines use, poisoned, beside the tables that describe them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from tierloom.stages.kv.layout import KVLayout
from tierloom.triton_kernels.memory.tables import FrameTable, PlaneTable

POISON = 0xA5
GUARD = 64
"""Poisoned bytes on both sides of everything that a kernel writes."""

POOLS = ("LBNHC", "LBHNC", "BLNHC", "BLHNC")
"""All layers in one tensor, whose order of dimensions this is; an engine hands it out as a view
[B, H, N, C] per layer (C: K and V side by side), and `KVLayout` makes the table."""
NATIVE = tuple(f"{order} native" for order in POOLS)
"""The same, in whole blocks: their slots are blocks, as many as there are slots otherwise."""
LAYOUTS = (
    *POOLS,
    "kv-first NHD",  # [2, nb, bs, H, D]
    "block-first NHD",  # [nb, 2, bs, H, D]
    "pairs NHD",  # K and V each [nb, bs, H, D]
    "pairs HND",  # K and V each [nb, H, bs, D]
    "kv-first HND",  # [2, nb, H, bs, D]
    "MLA",  # [nb, bs, D]
    "token-major",  # K and V each [slots, H, D]
    "concatenated",  # [nb, H, bs, 2D]
    "concatenated, K transposed",  # [nb, H, bs * 2D], the K half of a block [D, bs]
)


def poisoned(nbytes: int) -> torch.Tensor:
    return torch.full((nbytes,), POISON, dtype=torch.uint8)


@dataclass
class Cache:
    """An engine's cache: per layer one or two buffers, `views` as `reference` wants them."""

    layout: str
    buffers: list[torch.Tensor]
    views: list[torch.Tensor]
    kv: int

    @property
    def table(self) -> PlaneTable:
        first = self.views[0]
        size = first.element_size()
        return PlaneTable(
            base=np.array([view.data_ptr() for view in self.views], np.int64),
            stride=np.array([view.stride() for view in self.views], np.int64) * size,
            kv=self.kv,
            block_tokens=first.shape[1],
            heads=first.shape[2],
            dim=first.shape[3],
            itemsize=size,
        )

    @property
    def bytes(self) -> list[bytes]:
        return [buffer.cpu().numpy().tobytes() for buffer in self.buffers]


@dataclass
class Pool(Cache):
    """All layers in one buffer; `layers` are the engine's views of it."""

    layers: list[torch.Tensor]

    @property
    def table(self) -> PlaneTable:
        layout = KVLayout.from_tensors(self.layers, order="BHNC")
        return layout.planes(self.layers, native=self.layout in NATIVE)


def make_cache(
    layout: str,
    *,
    layers: int,
    blocks: int,
    block_tokens: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    seed: int | None = None,
    device: str = "cpu",
) -> Cache:
    """A poisoned cache, or with a seed one of random bytes; guards around each buffer."""
    nb, bs, h, d = blocks, block_tokens, 1 if layout == "MLA" else heads, dim
    shapes = {
        "kv-first NHD": (2, nb, bs, h, d),
        "block-first NHD": (nb, 2, bs, h, d),
        "pairs NHD": (nb, bs, h, d),
        "pairs HND": (nb, h, bs, d),
        "kv-first HND": (2, nb, h, bs, d),
        "MLA": (nb, bs, d),
        "token-major": (nb * bs, h, d),
        "concatenated": (nb, h, bs, 2 * d),
        "concatenated, K transposed": (nb, h, bs * 2 * d),
    }
    generator = torch.Generator().manual_seed(seed or 0)
    if layout in POOLS or layout in NATIVE:
        size = {"L": layers, "B": nb, "N": bs, "H": h, "C": 2 * d}
        if layout in NATIVE:
            size["B"] *= bs
        raw = poisoned(prod(size.values()) * dtype.itemsize + 2 * GUARD)
        if seed is not None:
            raw.random_(0, 256, generator=generator)
        return _pool(layout, raw.to(device), size, dtype)
    shape = shapes[layout]
    pairs = layout.startswith(("pairs", "token"))
    buffers: list[torch.Tensor] = []
    halves: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for _ in range(layers):
        made = []
        for _ in range(2 if pairs else 1):
            raw = poisoned(prod(shape) * dtype.itemsize + 2 * GUARD)
            if seed is not None:
                raw.random_(0, 256, generator=generator)
            raw = raw.to(device)
            buffers.append(raw)
            made.append(raw[GUARD:-GUARD].view(dtype).view(shape))
        for half, view in zip(halves, _views(layout, made, bs, d), strict=False):
            half.append(view)
    return Cache(layout, buffers, [*halves[0], *halves[1]], 1 if layout == "MLA" else 2)


def _pool(layout: str, raw: torch.Tensor, size: dict[str, int], dtype: torch.dtype) -> Pool:
    order = layout.removesuffix(" native")
    whole = raw[GUARD:-GUARD].view(dtype).view([size[letter] for letter in order])
    layers = list(whole.permute([order.index(letter) for letter in "LBHNC"]))
    if layout in NATIVE:
        inner = ["BHNC".index(letter) for letter in order if letter in "NHC"]
        blocks = [layer.permute(0, *inner).flatten(1)[:, None, None] for layer in layers]
        return Pool(layout, [raw], blocks, 1, layers)
    halves = [layer.transpose(1, 2).unflatten(3, (2, -1)).unbind(3) for layer in layers]
    return Pool(layout, [raw], [k for k, _ in halves] + [v for _, v in halves], 2, layers)


def _views(layout: str, made: list[torch.Tensor], bs: int, d: int) -> list[torch.Tensor]:
    """K and V of one layer (MLA: the latent) as [blocks, block_tokens, heads, dim]."""
    x = made[0]
    match layout:
        case "kv-first NHD":
            return [x[0], x[1]]
        case "block-first NHD":
            return [x[:, 0], x[:, 1]]
        case "pairs NHD":
            return made
        case "pairs HND":
            return [half.transpose(1, 2) for half in made]
        case "kv-first HND":
            return [x[0].transpose(1, 2), x[1].transpose(1, 2)]
        case "MLA":
            return [x[:, :, None]]
        case "token-major":
            return [half.unflatten(0, (-1, bs)) for half in made]
        case "concatenated":
            return [x[..., :d].transpose(1, 2), x[..., d:].transpose(1, 2)]
    k, v = x[..., : bs * d].unflatten(2, (d, bs)), x[..., bs * d :].unflatten(2, (bs, d))
    return [k.permute(0, 3, 1, 2), v.transpose(1, 2)]


@dataclass
class Frames:
    """Frames side by side in one buffer, a poisoned guard after each."""

    buffer: torch.Tensor
    table: FrameTable

    def content(self, f: int) -> bytes:
        start = int(self.table.address[f]) - self.buffer.data_ptr()
        return self.buffer[start : start + int(self.table.nbytes[f])].cpu().numpy().tobytes()

    def fill(self, f: int, content: bytes) -> None:
        start = int(self.table.address[f]) - self.buffer.data_ptr()
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self.buffer[start : start + len(content)] = data.to(self.buffer.device)

    def guards_hold(self) -> bool:
        written = self.buffer.cpu().clone()
        for f in range(len(self.table)):
            start = int(self.table.address[f]) - self.buffer.data_ptr()
            written[start : start + int(self.table.nbytes[f])] = POISON
        return bool((written == POISON).all())


def make_frames(
    planes: PlaneTable, groups: list[tuple[int, int]], rows: list[int], take: list[int],
    device: str = "cpu", shift: int = 0,
) -> Frames:  # fmt: skip
    """One poisoned frame per group; `shift` moves them off their 64-byte alignment.

    Frame f's slots begin where those of frame f - 1 end.
    """
    spans = np.array([planes.kv * (stop - start) for start, stop in groups], np.int64)
    nbytes = spans * np.array(rows, np.int64) * planes.row_bytes
    starts = np.concatenate([[0], np.cumsum((nbytes + 2 * GUARD - 1) // GUARD * GUARD)])
    buffer = poisoned(int(starts[-1]) + 3 * GUARD).to(device)
    first = (buffer.data_ptr() + 2 * GUARD - 1) // GUARD * GUARD + shift
    count = len(groups)
    table = FrameTable(
        address=(first + starts[:-1]).astype(np.int64),
        nbytes=nbytes,
        layer=np.array(groups, np.int32),
        rows=np.array(rows, np.int32),
        take=np.array(take, np.int32),
        slot0=np.concatenate([[0], np.cumsum(take)])[:-1].astype(np.int64),
        checksum=np.zeros(count, np.uint64),
        status=np.zeros(count, np.uint8),
    )
    return Frames(buffer, table)


def make_slots(count: int, total: int, rng: np.random.Generator, order: str) -> np.ndarray:
    """`count` distinct slots out of `total`: "permuted", "runs" (of 5), or with "holes" (-1)."""
    if order == "runs":
        starts = rng.permutation(total // 5)[: -(-count // 5)] * 5
        return (starts[:, None] + np.arange(5)).ravel()[:count].astype(np.int64)
    slots = rng.permutation(total)[:count].astype(np.int64)
    if order == "holes":
        slots[rng.random(count) < 0.3] = -1
    return slots
