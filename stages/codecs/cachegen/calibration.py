"""What `cachegen` knows of a model beforehand: a file that `tierloom calibrate` writes.

Means, steps and tables of every channel of the whole model, once for all frames. For levels of few
bits perhaps a transform of each head, too; then its coefficients have steps and tables. A frame
names the file by the first 8 bytes of its sha256, so that no frame is ever read by another one.
Files lie in ``${XDG_CACHE_HOME:-~/.cache}/tierloom/calibrations``, or where `calibration:` and
`calibrations:` say; without its file a frame is a miss. The format is safetensors, with a version
in its metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt

from tierloom.stages.codecs.cachegen.codebook import Codebook
from tierloom.stages.errors import ConfigError, Lost, Unreadable
from tierloom.stages.user_home import cache_folder, expanded

VERSION = "2"
LEVELS = ("high", "default", "small")
SUFFIX = ".safetensors"
_LENGTH = Struct("<Q")
_MOST_HEAD = 1 << 20
_TYPES = {"F32": np.float32, "F16": np.float16, "U16": np.uint16, "U8": np.uint8}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """One model's. Channels are numbered by KV head, then within the head."""

    id: int
    models: frozenset[str]
    """Fingerprints of the weights, in whatever dtype they are loaded, and of their files."""
    dim: int
    freqs: npt.NDArray[np.float32]
    """Radians per token [half], by which K is turned back."""
    means: npt.NDArray[np.float32]
    """[2, layers, channels]"""
    steps: npt.NDArray[np.float32]
    """[levels, 2, layers, channels]"""
    tabid: npt.NDArray[np.uint8]
    """[levels, 2, layers, channels]"""
    books: tuple[Codebook, ...]
    transforms: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None
    """[2, layers, heads, dim, dim] The transform of each head, and its inverse."""
    transformed: frozenset[int]
    """The levels that have it."""

    def slice(self, level: int, layers: range, channels: range) -> tuple[Any, ...]:
        """Means, steps and tables' numbers [2 * layers, channels] of a frame, the tables, and its
        transforms [2 * layers, heads, dim, dim], if any. Raises Unreadable where the model has no
        such layers or channels."""
        if layers.stop > self.means.shape[1] or channels.stop > self.means.shape[2]:
            text = f"calibration {self.id:016x} has no {layers} of {channels}"
            raise Unreadable(Lost.NO_CALIBRATION, text)
        found: tuple[Any, ...] = _sliced(self, level, layers, channels)
        return found


@lru_cache(256)
def _sliced(c: Calibration, level: int, layers: range, channels: range) -> Any:
    at = slice(None), slice(layers.start, layers.stop), slice(channels.start, channels.stop)
    arrays = [a[at].reshape(2 * len(layers), -1).copy() for a in (c.means, *(
        a[level] for a in (c.steps, c.tabid)
    ))]  # fmt: skip
    if c.transforms is None or level not in c.transformed:
        return *arrays, c.books[level], None
    heads = slice(channels.start // c.dim, channels.stop // c.dim)
    parts = (t[at[0], at[1], heads] for t in c.transforms)
    return *arrays, c.books[level], tuple(t.reshape(-1, *t.shape[2:]).copy() for t in parts)


def calibrations_folder() -> Path:
    """Where calibrations lie."""
    return cache_folder() / "calibrations"


def safetensors_bytes(tensors: dict[str, npt.NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """A safetensors file; the same bytes for the same values."""
    head: dict[str, Any] = {"__metadata__": {"tierloom": VERSION, **metadata}}
    at, parts = 0, []
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor).tobytes()
        place = [at, at + len(raw)]
        kind = _NAMES[tensor.dtype]
        head[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": place}
        at += len(raw)
        parts.append(raw)
    text = json.dumps(head, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((_LENGTH.pack(len(text)), text, *parts))


def read_calibration(path: str | Path) -> Calibration:
    """Read and remember a file, for whatever frame names it. Raises ConfigError."""
    file = expanded(path)
    try:
        stat = file.stat()
        found = _read(str(file), stat.st_mtime_ns, stat.st_size)
    except OSError as e:
        raise ConfigError(f"calibration {path}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, IndexError) as e:
        raise ConfigError(
            f"calibration {path} is not one that this tierloom reads ({e}): write it anew with "
            "tierloom calibrate"
        ) from e
    _known[found.id] = found
    return found


_known: dict[int, Calibration] = {}
"""By id. Content-addressed, so it does not matter who read them."""


def for_model(*names: str) -> Calibration | None:
    """The newest in the folder that is of a model with one of these fingerprints."""
    wanted = {name for name in names if name}
    return next((c for c in _all() if wanted & c.models), None)


def by_id(id: int) -> Calibration:
    """Raises Unreadable: it is not at hand."""
    if id not in _known:
        next((c for c in _all() if c.id == id), None)
    if id not in _known:
        raise Unreadable(
            Lost.NO_CALIBRATION,
            f"encoded by calibration {id:016x}, which is not in {calibrations_folder()}: copy it "
            "there, or name it in decode's `calibrations`",
        )
    return _known[id]


def _all() -> Iterator[Calibration]:
    """Those of the folder, newest first; what cannot be read is passed by."""
    try:
        files = sorted(
            calibrations_folder().glob(f"*{SUFFIX}"), key=lambda f: -f.stat().st_mtime_ns
        )
    except OSError:
        return
    for file in files:
        with suppress(ConfigError):
            yield read_calibration(file)


@lru_cache(32)
def _read(path: str, _mtime: int, _size: int) -> Calibration:
    data = Path(path).read_bytes()
    metadata, tensors = from_safetensors(data)
    if metadata["tierloom"] != VERSION:
        raise ValueError(f"version {metadata['tierloom']}")
    freqs, means, steps, tabid = (tensors[n] for n in ("freqs", "means", "steps", "tabid"))
    dim, shape = int(metadata["dim"]), means.shape
    books = tuple(Codebook.of(tensors[f"tables.{level}"]) for level in LEVELS)
    right = len(shape) == 3 and shape[0] == 2 and shape[2] % dim == 0 and freqs.ndim == 1
    right = right and steps.shape == tabid.shape == (len(LEVELS), *shape)
    right = right and 2 * len(freqs) <= dim and bool((steps > 0).all())
    right = right and all(np.isfinite(a).all() for a in (freqs, means, steps))
    right = right and all(t.max() < len(b.tables) for t, b in zip(tabid, books, strict=True))
    if not right:
        raise ValueError("shapes or values")
    transformed = frozenset(map(LEVELS.index, json.loads(metadata["transformed"])))
    transforms = None
    if transformed:
        heads = shape[2] // dim
        transforms = _with_inverse(tensors["transforms"], (2, shape[1], heads, dim, dim))
    id = int.from_bytes(sha256(data).digest()[:8], "little") or 1
    models = frozenset(json.loads(metadata["models"]))
    return Calibration(id, models, dim, freqs, means, steps, tabid, books, transforms, transformed)


def _with_inverse(matrices: npt.NDArray[Any], shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Raises ValueError."""
    if matrices.shape != shape or not np.isfinite(matrices).all():
        raise ValueError("transforms")
    inverse = np.linalg.inv(matrices.astype(np.float64)).astype(np.float32)  # LinAlgError is one
    if not np.isfinite(inverse).all():
        raise ValueError("transforms that have no inverse")
    return matrices.astype(np.float32), inverse


def from_safetensors(data: bytes) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    """Metadata and tensors of a safetensors file. Raises ValueError, KeyError or TypeError."""
    if len(data) < _LENGTH.size or (length := _LENGTH.unpack_from(data)[0]) > _MOST_HEAD:
        raise ValueError("no safetensors")
    head = json.loads(data[_LENGTH.size : _LENGTH.size + length])
    metadata = head.pop("__metadata__")
    body = data[_LENGTH.size + length :]
    tensors = {}
    for name, entry in head.items():
        kind, shape = np.dtype(_TYPES[entry["dtype"]]), tuple(map(int, entry["shape"]))
        first, last = map(int, entry["data_offsets"])
        if not 0 <= first <= last <= len(body) or math.prod(shape) * kind.itemsize != last - first:
            raise ValueError(f"{name} lies outside")
        tensors[name] = np.frombuffer(body[first:last], kind).reshape(shape)
    return metadata, tensors
