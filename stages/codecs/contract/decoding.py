"""What a frame's codec ids mean: the table that `decode` reads, so that any config reads any frame.

A decoder is a function `(data, shape, site) -> bytes`, imported when its id is first met. It
raises BadObject (never Damaged: that is for checksums to say), and allocates nothing before it has
checked every length against the shape; no more than the frame's own bytes then. Ids are part of the
format and never reused.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Protocol

from tierloom.stages.catalog import CODECS, Codec
from tierloom.stages.codecs.contract.frame_shape import Bytes, FrameShape, Site
from tierloom.stages.errors import BadObject

PLANES, ZSTD, LZ4, FP8, INT8, INT4, TURBOQUANT, RANS, CACHEGEN, AESGCM, PROGRESSIVE, *_ = CODECS

MOST_CODECS = 8
"""Ids that a frame's entry in the header has room for."""


class Decoder(Protocol):
    def __call__(self, data: Bytes, shape: FrameShape, site: Site | None, /) -> Bytes: ...


@lru_cache
def decoder(codec: int) -> Decoder:
    """The decoder of an id. Raises BadObject where there is none, or not what it needs."""
    if codec not in CODECS:
        raise BadObject(f"codec {codec} is unknown to this version")
    known = CODECS[codec]
    try:
        found: Decoder = getattr(_module(known), known.decoder)
    except ImportError as e:
        raise BadObject(
            f"codec {codec} ({known.name}) needs a package that is not there: {e}"
        ) from e
    return found


def codec_name(codec: int) -> str:
    return CODECS[codec].name if codec in CODECS else f"unknown ({codec})"


def describe(data: bytes, codecs: bytes, scan: int) -> str:
    """What a frame's first codec can say of it without a key; mostly nothing."""
    known = CODECS.get(codecs[0]) if codecs else None
    if known is None or not known.describe:
        return ""
    said: str = getattr(_module(known), known.describe)(data, codecs, scan)
    return said


def _module(codec: Codec) -> ModuleType:
    return import_module(codec.full_module)


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
