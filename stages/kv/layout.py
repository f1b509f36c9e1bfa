"""KVLayout: the only thing that knows how an engine lays out its cache.

Every layout becomes base pointers and strides (`PlaneTable`), so that nothing after this file has a
layout to care about. A layout is named by the letters of a layer's tensor, in order:

    2  K and V (length 2)     B  blocks    N  tokens in a block    H  heads    D  channels
    S  token slots (a pool without blocks)  C  K and V of a token side by side (2 x channels)

so vLLM's flash layout is `2BNHD`; a tuple (K, V) per layer is written without the 2, as `BNHD`.
`BHC` layouts whose K is transposed inside the block (vLLM's CPU attention) are `BHNC-KT`. Nothing
is guessed: a shape that fits two layouts is refused, with the names to choose from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tierloom.stages.errors import InputError, LayoutError
from tierloom.stages.kv.block_table import block_table
from tierloom.stages.kv.geometry import DTYPES, Geometry
from tierloom.triton_kernels.memory.tables import PlaneTable

if TYPE_CHECKING:
    import torch

ORDERS = (
    "2BNHD", "B2NHD", "2BHND", "B2HND", "BNHD", "BHND", "SHD", "BND", "BHNC", "BHNC-KT",
)  # fmt: skip
_SHORT = {"NHD": ("2BNHD", "B2NHD", "BNHD"), "HND": ("2BHND", "B2HND", "BHND"), "MLA": ("BND",)}
PAIRS = ("BNHD", "BHND", "SHD")
"""Orders whose K and V are two tensors."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How an engine lays out its cache; made from its tensors, holds none of them."""

    order: str
    layers: int
    block_tokens: int
    blocks: int
    """Blocks per layer (for a pool: token slots / block_tokens)."""
    heads: int
    dim: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Of one layer's tensor (or of its K), in elements."""
    device: str
    """`cpu`, or `cuda:3`: which one counts, and which is current says nothing of it."""

    @classmethod
    def from_tensors(
        cls, caches: Sequence[Any], *, order: str, block_tokens: int | None = None
    ) -> KVLayout:
        """Describe `caches`: one tensor per layer, or one (K, V) pair per layer.

        `order` is one of `ORDERS`, or `NHD`, `HND`, `MLA` where the shape settles the rest.
        `block_tokens` is needed for pools (`SHD`) only; elsewhere it is checked against the shape.
        Raises LayoutError.
        """
        if not len(caches):
            raise LayoutError("caches is empty: pass one tensor (or one K, V pair) per layer")
        paired = isinstance(caches[0], (tuple, list))
        first = caches[0][0] if paired else caches[0]
        full = _resolve(order, tuple(first.shape), paired)
        letters = full.removesuffix("-KT")
        size = dict(zip(letters, first.shape, strict=True))
        stride = dict(zip(letters, first.stride(), strict=True))
        tokens = size.get("N", block_tokens or 0)
        if not tokens:
            raise LayoutError(f"{full} has no blocks of its own: say block_tokens=")
        if block_tokens is not None and "N" in size and block_tokens != tokens:
            raise LayoutError(
                f"block_tokens={block_tokens}, but {full} {tuple(first.shape)} has {tokens}"
            )
        if first.device.type not in ("cpu", "cuda"):
            raise LayoutError(f"a cache on {first.device} is not kept; known: cpu, cuda")
        dtype = str(first.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise LayoutError(f"dtype {dtype} is not kept; known: {', '.join(DTYPES)}")
        dim = size["C"] // 2 if "C" in size else size["D"]
        if stride["C" if "C" in size else "D"] != 1:
            raise LayoutError(
                f"the last letter of {full} must be contiguous, stride is {first.stride()}"
            )
        if "C" in size and (size["C"] % 2 or (full.endswith("-KT") and stride["N"] != size["C"])):
            raise LayoutError(
                f"{full} wants dense blocks of K and V side by side, got {tuple(first.shape)}"
            )
        layout = cls(
            order=full, layers=len(caches), block_tokens=tokens,
            blocks=size["B"] if "B" in size else size["S"] // tokens,
            heads=size.get("H", 1), dim=dim, dtype=dtype, shape=tuple(first.shape),
            stride=tuple(first.stride()), device=str(first.device),
        )  # fmt: skip
        layout.check(caches)
        return layout

    @classmethod
    def mla(cls, caches: Sequence[torch.Tensor]) -> KVLayout:
        """Multi-head latent attention: one latent `[blocks, tokens, dim]` per layer."""
        return cls.from_tensors(caches, order="MLA")

    @property
    def kv(self) -> int:
        """2 for K and V, 1 for a latent."""
        return 1 if self.order == "BND" else 2

    @property
    def slots(self) -> int:
        """Token slots per layer."""
        return (
            self.shape[self.order.index("S")]
            if "S" in self.order
            else self.blocks * self.block_tokens
        )

    @property
    def rows_contiguous(self) -> bool:
        """A token's heads lie side by side, so canonical order costs no more than native."""
        return self.order in ("2BNHD", "B2NHD", "BNHD", "SHD", "BND")

    def geometry(self, *, native: bool) -> Geometry:
        """What is kept of this cache. Raises LayoutError when native order cannot be had."""
        if not native:
            return Geometry(self.kv, self.layers, self.heads, self.dim, self.dtype, 1)
        kv, words = self._block()
        return Geometry(kv, self.layers, 1, words, self.dtype, self.block_tokens, native=True)

    @property
    def dense_blocks(self) -> bool:
        """A block is one run of memory, so that it can be kept in native order."""
        try:
            self._block()
        except LayoutError:
            return False
        return True

    @property
    def fingerprint(self) -> bytes:
        """Names everything native bytes depend on; part of the namespace in native order."""
        inner = tuple(s for c, s in zip(self.order, self.stride, strict=False) if c not in "2B")
        text = f"{self.order} {self.block_tokens} {self.heads} {self.dim} {self.dtype} {inner}"
        return hashlib.sha256(text.encode()).digest()

    def _repr_html_(self) -> str:
        from tierloom.stages.display.layout_picture import layout_svg

        return layout_svg(self.order, self.shape, self.stride, self._words())

    def _words(self) -> str:
        g = self.geometry(native=False)
        return (
            f"{self.layers} layers of {self.heads} heads x {self.dim}, {self.dtype} on "
            f"{self.device}: {g.frame_bytes(g.layers, 1):,} bytes a token, {self.slots:,} tokens"
        )

    def check(self, caches: Sequence[Any]) -> None:
        """Raise LayoutError unless every layer of `caches` is laid out like this."""
        if len(caches) != self.layers:
            raise LayoutError(f"{len(caches)} layers given, the layout has {self.layers}")
        paired = self.order in PAIRS
        for i, layer in enumerate(caches):
            parts = layer if isinstance(layer, (tuple, list)) else (layer,)
            if len(parts) != (2 if paired else 1):
                raise LayoutError(
                    f"layer {i}: {self.order} wants {'(K, V)' if paired else 'one tensor'}"
                )
            for t in parts:
                seen = (
                    tuple(t.shape),
                    tuple(t.stride()),
                    str(t.dtype).removeprefix("torch."),
                    str(t.device),
                )
                if seen != (self.shape, self.stride, self.dtype, self.device):
                    raise LayoutError(
                        f"layer {i}: shape, stride, dtype, device are {seen}; the layout has "
                        f"{(self.shape, self.stride, self.dtype, self.device)}"
                    )

    def planes(self, caches: Sequence[Any], *, native: bool = False) -> PlaneTable:
        """Pointers into `caches` (checked first). The caller keeps the tensors alive."""
        self.check(caches)
        item = self.geometry(native=False).itemsize
        size = {
            c: n * item for c, n in zip(self.order.removesuffix("-KT"), self.stride, strict=True)
        }
        pointers = [
            [t.data_ptr() for t in (layer if isinstance(layer, (tuple, list)) else (layer,))]
            for layer in caches
        ]
        if len({at for p in pointers for at in p}) < sum(map(len, pointers)):
            raise LayoutError(f"{self.order}: two of the tensors given begin at the same address")
        if native:
            kv, words = self._block()
            apart = [0, size["2"]] if "2" in size else [0, 0]
            base = [p[min(k, len(p) - 1)] + apart[k] for k in range(kv) for p in pointers]
            return PlaneTable.of_blocks(np.array(base, np.int64), size["B"], words * item, kv)
        whole = [size.get("B", self.block_tokens * size.get("S", 0))]
        token, head = size.get("N", size.get("S", 0)), size.get("H", self.dim * item)
        rows = [[*whole, token, head, item]] * 2
        if "C" in size:
            apart = [0, self.dim * (self.block_tokens if self.order.endswith("-KT") else 1) * item]
            if self.order.endswith("-KT"):  # K is [D, N], V is [N, D], one after the other
                rows = [
                    [*whole, item, head, self.block_tokens * item],
                    [*whole, self.dim * item, head, item],
                ]
        else:
            apart = [0, size.get("2", 0)]
        base = [p[min(k, len(p) - 1)] + apart[k] for k in range(self.kv) for p in pointers]
        stride = [rows[k] for k in range(self.kv) for _ in pointers]
        return PlaneTable(
            np.array(base, np.int64), np.array(stride, np.int64), self.kv, self.block_tokens,
            self.heads, self.dim, item,
        )  # fmt: skip

    def check_slots(self, slots: Any, tokens: int) -> npt.NDArray[np.int64]:
        """`slots` as int64, one per token, each inside the cache. Raises InputError."""
        raw = slots.detach().cpu().numpy() if hasattr(slots, "detach") else np.asarray(slots)
        if raw.ndim != 1 or (raw.size and raw.dtype.kind not in "iu"):
            raise InputError(f"slots must be a 1-D array of integers, got {raw.ndim}-D {raw.dtype}")
        if len(raw) < tokens:
            raise InputError(f"{len(raw)} slots for {tokens} tokens: one is needed per token")
        out = np.ascontiguousarray(raw[:tokens], dtype=np.int64)
        if len(out) and (int(out.min()) < 0 or int(out.max()) >= self.slots):
            bad = int(np.flatnonzero((out < 0) | (out >= self.slots))[0])
            raise InputError(f"slots[{bad}] is {int(out[bad])}, outside 0..{self.slots - 1}")
        return out

    def rows_of_blocks(self, blocks: Any, tokens: int, *, native: bool) -> npt.NDArray[np.int64]:
        """A block table as kernels take it: blocks in native order, token slots in canonical.

        `blocks`: a `BlockTable`, or the ids alone where the span begins with the first of them.
        Block -1 is left out: nothing is read from it or written to it. Raises InputError when the
        table is too short or out of range, or does not suit native order.
        """
        table, size = block_table(blocks), self.block_tokens
        ids = np.asarray(table.blocks)[: -(-(table.skip + tokens) // size)]
        if len(ids) and (int(ids.min()) < -1 or int(ids.max()) >= self.blocks):
            bad = int(np.flatnonzero((ids < -1) | (ids >= self.blocks))[0])
            raise InputError(f"blocks[{bad}] is {int(ids[bad])}, outside 0..{self.blocks - 1}")
        return table.rows(tokens, size, native=native)

    def block_rows(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Blocks of token slots that fill whole blocks, the last one perhaps not; for native
        order.

        Raises InputError where the slots jump inside a block.
        """
        size = self.block_tokens
        rows = slots[::size] // size
        offsets = slots - np.repeat(rows, size)[: len(slots)] * size
        wrong = np.flatnonzero(offsets != np.arange(len(slots)) % size)
        if len(wrong):
            raise InputError(
                f"slots[{int(wrong[0])}] breaks a block of {size}: native order keeps whole blocks"
            )
        return np.ascontiguousarray(rows)

    def _block(self) -> tuple[int, int]:
        """(planes per layer, elements) of a native block; a block must be one run of memory."""
        letters = self.order.removesuffix("-KT")
        size, step = (
            dict(zip(letters, self.shape, strict=True)),
            dict(zip(letters, self.stride, strict=True)),
        )
        if "S" in size:
            raise LayoutError(
                f"{self.order} has no blocks to keep in native order: use order: canonical"
            )
        inner = sorted((c for c in letters if c not in "2B"), key=lambda c: step[c])
        words = 1
        for c in inner:
            if step[c] != words and size[c] > 1:
                raise LayoutError(
                    f"a block of {self.order} with strides {self.stride} is not contiguous"
                )
            words *= size[c]
        return (1 if "C" in size or self.order == "BND" else 2), words


def _resolve(order: str, shape: tuple[int, ...], paired: bool) -> str:
    """The full name of `order` for a tensor of `shape`. Raises LayoutError."""
    names = _SHORT.get(order, (order,))
    if not set(names) <= set(ORDERS):
        raise LayoutError(f"order {order!r} is unknown; known: {', '.join((*_SHORT, *ORDERS))}")
    fits = [
        name
        for name in names
        if len(name.removesuffix("-KT")) == len(shape)
        and (name in PAIRS) == paired
        and ("2" not in name or shape[name.index("2")] == 2)
    ]
    if len(fits) != 1:
        what = (
            "fits " + " and ".join(fits) + ": name the one it is" if fits else "fits none of them"
        )
        pair = "a (K, V) pair of " if paired else ""
        raise LayoutError(f"order {order} ({', '.join(names)}): {pair}shape {shape} {what}")
    return fits[0]
