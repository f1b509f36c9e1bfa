"""What a frame's codec ids mean: the table that `decode` reads, so that any config reads any frame.

A decoder is a function `(data, shape, site) -> bytes`, imported when its id is first met. It
raises BadObject (never Damaged: that is for checksums to say), and allocates nothing before it has
checked every length against the shape; no more than the frame's own bytes then. Ids are part of the
format and never reused.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from ..errors import BadObject

if TYPE_CHECKING:
    from .shape import Bytes, FrameShape, Site

PLANES, ZSTD, LZ4, FP8, INT8, INT4, TURBOQUANT, RANS, CACHEGEN, AESGCM, PROGRESSIVE = range(1, 12)

DECODERS = {
    PLANES: "planes:join_planes",
    ZSTD: "zstd:unzstd",
    LZ4: "lz4:unlz4",
    FP8: "fp8:from_fp8",
    INT8: "int8:from_int8",
    INT4: "int4:from_int4",
    TURBOQUANT: "turboquant:from_turboquant",
    CACHEGEN: "cachegen:from_cachegen",
    RANS: "rans:from_rans",
    AESGCM: "aesgcm:opened",
    PROGRESSIVE: "progressive:from_progressive",
}
"""Where the decoders are: `module:function` in this folder."""

NAMES = {
    PLANES: "planes", ZSTD: "zstd", LZ4: "lz4", FP8: "fp8", INT8: "int8", INT4: "int4",
    TURBOQUANT: "turboquant", RANS: "rans", CACHEGEN: "cachegen", AESGCM: "aesgcm",
    PROGRESSIVE: "progressive",
}  # fmt: skip

MOST_CODECS = 8
"""Ids that a frame's entry in the header has room for."""


class Decoder(Protocol):
    def __call__(self, data: Bytes, shape: FrameShape, site: Site | None, /) -> Bytes: ...


@lru_cache
def decoder(codec: int) -> Decoder:
    """The decoder of an id. Raises BadObject where there is none, or not what it needs."""
    name = f" ({NAMES[codec]})" if codec in NAMES else ""
    if codec not in DECODERS:
        raise BadObject(f"codec {codec}{name} is unknown to this version")
    module, _, function = DECODERS[codec].partition(":")
    try:
        found: Decoder = getattr(import_module(f"{__package__}.{module}"), function)
    except ImportError as e:
        raise BadObject(f"codec {codec}{name} needs a package that is not there: {e}") from e
    return found


def decode_frame(data: Bytes, shape: FrameShape, codecs: bytes, site: Site | None = None) -> Bytes:
    """Undo a codec chain, last first. Raises BadObject on an unknown id or a wrong length."""
    data = undo(data, shape, codecs, site)
    if memoryview(data).nbytes != shape.nbytes:
        raise BadObject(f"decoded to {memoryview(data).nbytes} bytes, expected {shape.nbytes}")
    return data


def undo(
    data: Bytes, shape: FrameShape, codecs: bytes, site: Site | None = None, *, down_to: int = 0
) -> Bytes:
    """Undo the codecs of a chain from the last down to number `down_to`. Raises BadObject."""
    for i in reversed(range(down_to, len(codecs))):
        here = site._replace(codecs=codecs[:i]) if site else None
        data = decoder(codecs[i])(data, shape, here)
    return data
