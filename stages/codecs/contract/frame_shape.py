"""What a codec knows of a frame: the shape of its elements, and where it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tierloom.stages.codecs.contract.keyring import Keyring
from tierloom.stages.errors import BadObject
from tierloom.stages.kv.geometry import DTYPES
from tierloom.stages.kv.object import Header

Bytes = bytes | memoryview

ELEMENTS: dict[str, type[np.generic]] = {
    "bfloat16": np.uint16, "float16": np.int16, "float32": np.uint32,
}  # fmt: skip
"""Dtypes that lossy codecs take, and the arrays that hold their bits for `triton_kernels`."""


class FrameShape(NamedTuple):
    """One frame's elements: ``[kv, layers, tokens, heads, dim]``.

    In native order (`Geometry`) a row is a block: `tokens` counts those, and `heads` is 1.
    """

    kv: int
    layers: int
    tokens: int
    heads: int
    dim: int
    dtype: str
    first_layer: int = 0
    """As this object's geometry counts them."""
    start: int = -1
    """Encoders: the position in the prompt of the first token; -1 where it is not known. Decoders
    never know it: what depends on it is in the encoded bytes."""

    @classmethod
    def of(cls, header: Header, index: int, start: int = -1) -> FrameShape:
        """The shape of frame `index` of an object."""
        g, first = header.geometry, index % header.groups * header.group
        return cls(
            g.kv, min(header.group, g.layers - first), g.rows(header.tokens), g.heads, g.dim,
            g.dtype, first, start,
        )  # fmt: skip

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype]

    @property
    def planes(self) -> int:
        """K planes of all layers, then V planes of all layers."""
        return self.kv * self.layers

    @property
    def channels(self) -> int:
        return self.heads * self.dim

    @property
    def nbytes(self) -> int:
        """The frame's bytes, decoded."""
        return self.planes * self.tokens * self.channels * self.itemsize


class Site(NamedTuple):
    """Where a frame is, for codecs that tie its bytes to the place."""

    header: Header
    """Encoders: of the plain object. Decoders: as read. All but `frames` is the same."""
    number: int
    """Which frame of it."""
    codecs: bytes
    """Codec ids applied before this one."""
    keys: Keyring | None = None
    """Decoders: what they may open frames with."""


Part = tuple[type[np.generic], tuple[int, ...]]
"""An array inside encoded bytes: its type, whose bytes are little-endian, and its shape."""


def sized(parts: tuple[Part, ...]) -> int:
    """Bytes of arrays one after another. Python's integers: nothing overflows."""
    total = 0
    for kind, shape in parts:
        count = 1
        for n in shape:
            count *= n
        total += count * np.dtype(kind).itemsize
    return total


def fresh(head: bytes, parts: tuple[Part, ...]) -> tuple[memoryview, list[npt.NDArray[Any]]]:
    """Room for `head` and arrays after it, not initialized: the bytes, and writable views."""
    whole = np.empty(len(head) + sized(parts), np.uint8)
    whole[: len(head)] = np.frombuffer(head, np.uint8)
    return whole.data, _views(whole, len(head), parts)


def parted(data: Bytes, head: int, parts: tuple[Part, ...]) -> list[npt.NDArray[Any]]:
    """The arrays after the first `head` bytes, read-only. Raises BadObject unless `data` is
    exactly so long; copies only what is not aligned."""
    if memoryview(data).nbytes != head + sized(parts):
        raise BadObject(f"{memoryview(data).nbytes} bytes, expected {head + sized(parts)}")
    arrays = _views(np.frombuffer(data, np.uint8), head, parts)
    return [read_only(a) for a in arrays]


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same, as compiled code knows its inputs: aligned, and not writable."""
    array = array if array.flags.aligned else array.copy()
    array.flags.writeable = False
    return array


def _views(
    whole: npt.NDArray[np.uint8], at: int, parts: tuple[Part, ...]
) -> list[npt.NDArray[Any]]:
    arrays = []
    for kind, shape in parts:
        nbytes = sized(((kind, shape),))
        arrays.append(whole[at : at + nbytes].view(kind).reshape(shape))
        at += nbytes
    return arrays
