"""turboquant: rotated at random, then four or three bits an element.

    small: {use: turboquant, from: host, bits: 4}

Lossy: bits + 16 / head dim an element. Zandieh, Daliri, Hadian, Mirrokni, "TurboQuant", arXiv
2504.19874: after a random rotation the coordinates of any vector look alike, so one codebook
(Lloyd-Max for N(0, 1 / dim)) serves all, and no scale but the vector's length is stored. Here K and
V both are rotated, head by head, by seeded flips of signs and a Walsh-Hadamard transform, and a
decoded vector has the length of the original. Head dims must be powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import shake_128
from struct import Struct
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tierloom.stages.codecs.contract.decoding import TURBOQUANT
from tierloom.stages.codecs.contract.frame_shape import Bytes, FrameShape, Part, Site, fresh, parted
from tierloom.stages.codecs.contract.lossy import Array, Lossy, as_bytes, blank, head_of
from tierloom.stages.contract.stage import Context
from tierloom.stages.errors import BadObject, LayoutError
from tierloom.triton_kernels.turboquant.cpu import codebook, turboquant_decode, turboquant_encode

_HEAD = Struct("<BBxxI")


@dataclass(frozen=True, kw_only=True, slots=True)
class TurboQuantOptions:
    """How many bits, and which rotation."""

    bits: Literal[3, 4] = 4
    """Bits of a code."""
    seed: int = 42
    """Of the flips of signs; stored with each frame."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must lie in 0..{(1 << 32) - 1}, got {self.seed}")


class TurboQuant(Lossy):
    """A version, bits and seed; gains float16 [planes, tokens * heads]; codes [planes, tokens *
    heads, dim * bits / 8]."""

    Options = TurboQuantOptions
    codec = TURBOQUANT

    def __init__(self, options: TurboQuantOptions, ctx: Context) -> None:
        if ctx is not None and not _fits(ctx.geometry.dim):
            raise LayoutError(
                f"turboquant wants heads of 8, 16, 32, ... channels, and this model's have "
                f"{ctx.geometry.dim}: use int4, which takes any"
            )
        super().__init__(options, ctx)

    def quantize(self, x: Array, shape: FrameShape) -> memoryview | None:
        bits, seed = self.options.bits, self.options.seed
        made, (gains, codes) = fresh(_HEAD.pack(1, bits, seed), _parts(shape, bits))
        levels, bounds = codebook(bits)
        vectors = x.reshape(shape.planes, -1, shape.dim)
        whole = turboquant_encode(vectors, _signs(shape, seed), levels, bounds, gains, codes)
        return made if whole else None


def from_turboquant(data: Bytes, shape: FrameShape, site: Site | None = None) -> Bytes:
    """Inverse of `TurboQuant.quantize`. Raises BadObject."""
    _, bits, seed = head_of(data, _HEAD, shape)
    if bits not in (3, 4) or not _fits(shape.dim):
        raise BadObject(f"turboquant: {bits} bits for heads of {shape.dim}")
    gains, codes = parted(data, _HEAD.size, _parts(shape, bits))
    x = blank(shape)
    levels, _ = codebook(bits)
    vectors = x.reshape(shape.planes, -1, shape.dim)
    turboquant_decode(codes, _signs(shape, seed), levels, gains, vectors)
    return as_bytes(x)


def _fits(dim: int) -> bool:
    return dim >= 8 and dim & (dim - 1) == 0


def _signs(shape: FrameShape, seed: int) -> npt.NDArray[np.float32]:
    """1 or -1, float32 [planes, dim]: others for each layer, and for K and V."""
    layers = range(shape.first_layer, shape.first_layer + shape.layers)
    return np.stack([_flips(seed, kv, at, shape.dim) for kv in range(shape.kv) for at in layers])


@lru_cache(1024)
def _flips(seed: int, kv: int, layer: int, dim: int) -> npt.NDArray[Any]:
    """Bit i of SHAKE128 of seed, K or V and layer, as float32: 0 is 1, 1 is -1."""
    digest = shake_128(b"tierloom turboquant" + Struct("<III").pack(seed, kv, layer))
    bits = np.unpackbits(np.frombuffer(digest.digest(dim // 8), np.uint8), bitorder="little")
    return (1 - 2.0 * bits).astype(np.float32)


def _parts(shape: FrameShape, bits: int) -> tuple[Part, ...]:
    planes, vectors = shape.planes, shape.tokens * shape.heads
    return (np.int16, (planes, vectors)), (np.uint8, (planes, vectors, shape.dim * bits // 8))
