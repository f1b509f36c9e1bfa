"""Byte planes: exponents compress, mantissas do not, so they are separated first."""

from __future__ import annotations

import numpy as np

from tierloom.stages.codecs.contract.frame_shape import Bytes, FrameShape, Site
from tierloom.stages.errors import BadObject


def split_planes(data: Bytes, itemsize: int) -> bytes:
    """Byte i of every element side by side, for i = 0, 1, ..."""
    return np.frombuffer(data, np.uint8).reshape(-1, itemsize).T.tobytes()


def join_planes(data: Bytes, shape: FrameShape, site: Site | None = None) -> bytes:
    """Inverse of `split_planes`. Raises BadObject when the length cannot be right."""
    flat = np.frombuffer(data, np.uint8)
    if flat.size != shape.nbytes:
        raise BadObject(f"{flat.size} bytes of planes, expected {shape.nbytes}")
    return flat.reshape(shape.itemsize, -1).T.tobytes()
