"""What a frame's codec ids mean: the table that `decode` reads, so that any config reads any frame.

A codec turns bytes into bytes: `encode(data, itemsize)` and `decode(data, raw, itemsize)`, `raw`
being the length of what comes out. Ids are part of the format and never reused.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..errors import BadObject

Bytes = bytes | memoryview

PLANES, ZSTD, LZ4 = 1, 2, 3


class Decoder(Protocol):
    def __call__(self, data: Bytes, raw: int, itemsize: int) -> Bytes: ...


def split_planes(data: Bytes, itemsize: int) -> bytes:
    """Byte i of every element side by side, for i = 0, 1, ...: exponents compress, mantissas do
    not."""
    return np.frombuffer(data, np.uint8).reshape(-1, itemsize).T.tobytes()


def join_planes(data: Bytes, raw: int, itemsize: int) -> bytes:
    """Inverse of `split_planes`. Raises BadObject when the length cannot be right."""
    flat = np.frombuffer(data, np.uint8)
    if flat.size != raw or raw % itemsize:
        raise BadObject(f"{flat.size} bytes of planes, expected {raw}")
    return flat.reshape(itemsize, -1).T.tobytes()


def _unzstd(data: Bytes, raw: int, itemsize: int) -> bytes:
    import zstandard

    try:
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=raw)
    except zstandard.ZstdError as e:
        raise BadObject(f"zstd: {e}") from e


def _unlz4(data: Bytes, raw: int, itemsize: int) -> bytes:
    import lz4.block

    try:
        plain: bytes = lz4.block.decompress(data, uncompressed_size=raw)
    except (lz4.block.LZ4BlockError, ValueError) as e:
        raise BadObject(f"lz4: {e}") from e
    return plain


DECODERS: dict[int, Decoder] = {PLANES: join_planes, ZSTD: _unzstd, LZ4: _unlz4}


def decode_frame(data: Bytes, raw: int, itemsize: int, codecs: bytes) -> Bytes:
    """Undo a codec chain, last first. Raises BadObject on an unknown id or a wrong length."""
    for codec in reversed(codecs):
        if codec not in DECODERS:
            raise BadObject(f"codec {codec} is unknown to this version")
        data = DECODERS[codec](data, raw, itemsize)
    if memoryview(data).nbytes != raw:
        raise BadObject(f"decoded to {memoryview(data).nbytes} bytes, expected {raw}")
    return data
