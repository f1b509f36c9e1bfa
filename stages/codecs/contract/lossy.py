"""What the lossy codecs share: they quantize plain frames of floats in canonical order."""

from __future__ import annotations

from abc import abstractmethod
from struct import Struct
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tierloom.stages.codecs.contract.encode import Compiled
from tierloom.stages.codecs.contract.frame_shape import ELEMENTS, Bytes, FrameShape, read_only
from tierloom.stages.errors import BadObject

Array = Any
"""A NumPy array, whose type the compiled kernels check."""


class Lossy(Compiled):
    """Frames of bfloat16, float16 and float32 are quantized; others pass as they are, and so does
    a frame with a number that is not finite or that the codec's scales cannot reach: it would be
    of no use to itself and would spoil its neighbors."""

    takes = "kv@host/frame"
    canonical = True
    codec: ClassVar[int]

    @abstractmethod
    def quantize(self, x: Array, shape: FrameShape) -> memoryview | None:
        """The encoded bytes of element bits ``[planes, tokens, heads, dim]``, read-only; None
        where a number is not finite, or too large."""

    def squeeze(self, data: Bytes, shape: FrameShape, before: bytes) -> tuple[Bytes, bytes] | None:
        if before or shape.dtype not in ELEMENTS:
            return None
        made = self.quantize(elements(data, shape), shape)
        return None if made is None else (made, bytes((self.codec,)))


def head_of(data: Bytes, layout: Struct, shape: FrameShape) -> tuple[int, ...]:
    """The fields that encoded bytes begin with, the first of which is a version, 1. Raises
    BadObject, also where a lossy codec does not take the frame's elements."""
    if shape.dtype not in ELEMENTS or not shape.nbytes:
        raise BadObject(f"quantized, but {shape}")
    if memoryview(data).nbytes < layout.size:
        raise BadObject(f"cut short: {memoryview(data).nbytes} bytes")
    fields: tuple[int, ...] = layout.unpack_from(data)
    if fields[0] != 1:
        raise BadObject(f"version {fields[0]} of a codec is unknown to this tierloom")
    return fields


def elements(data: Bytes, shape: FrameShape) -> npt.NDArray[Any]:
    """A plain frame's element bits ``[planes, tokens, heads, dim]``, read-only."""
    flat = read_only(np.frombuffer(data, ELEMENTS[shape.dtype]))
    return flat.reshape(shape.planes, shape.tokens, shape.heads, shape.dim)


def blank(shape: FrameShape) -> npt.NDArray[Any]:
    """Room for a decoded frame: element bits ``[planes, tokens, heads, dim]``, not initialized."""
    return np.empty((shape.planes, shape.tokens, shape.heads, shape.dim), ELEMENTS[shape.dtype])


def as_bytes(frame: npt.NDArray[Any]) -> memoryview:
    return frame.reshape(-1).view(np.uint8).data
