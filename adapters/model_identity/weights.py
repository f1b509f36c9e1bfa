"""The weight files of a model: where they are, and a content id of them.

The id is the same whatever engine, dtype or config they are loaded with.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tierloom.adapters.model_identity.config import STRIP, STRIPS, strip_starts
from tierloom.stages.kv.namespace import tlv

WHOLE = 64 << 20
"""Bytes of weight files that are hashed whole; of more each file gives `STRIPS` strips."""
PIECE = 1 << 20
"""Bytes read at once."""

KINDS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
"""Kinds of weight files; as in vLLM only the first kind that a folder holds is loaded."""


def files_id(name: str, revision: str | None = None, cache: str | None = None) -> str:
    """Hex sha256 over the names, sizes and content (of large ones, samples) of the weight files of
    a folder or of a hub id in the local cache; empty where none can be read."""
    folder, files = find(name, revision, cache, KINDS) if name else (None, [])
    if folder is None or not files:
        return ""
    h = hashlib.sha256(tlv(("tierloom", b"weight files/1")))
    try:
        hash_files(h, folder, files)
    except OSError:
        return ""
    return h.hexdigest()


def find(
    name: str, revision: str | None, cache: str | None, patterns: Sequence[str]
) -> tuple[Path | None, list[Path]]:
    """(folder, sorted files of the first pattern that has any) of a local folder, file or hub id.

    Only in the folder itself, as vLLM does it: what lies deeper belongs to others (checkpoints).
    """
    path = Path(name)
    if path.is_file():
        fits = [p for p in patterns if path.match(p)]
        return (path.parent, [path]) if fits else (None, [])
    for pattern in patterns:
        folder = path if path.is_dir() else _snapshot(name, revision, cache, pattern)
        if folder is not None and (files := sorted(p for p in folder.glob(pattern) if p.is_file())):
            return folder, files
    return None, []


def _snapshot(name: str, revision: str | None, cache: str | None, pattern: str) -> Path | None:
    """The folder of a hub id in the local cache; never asks the hub."""
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            name, revision=revision, cache_dir=cache, allow_patterns=[pattern],
            local_files_only=True,
        )  # fmt: skip
    except (ImportError, OSError, ValueError):  # not there, not whole, or not a hub id at all
        return None
    return Path(found)


def hash_files(h: Any, folder: Path, files: Sequence[Path]) -> None:
    """Put names, sizes and content of files into a hash. Raises OSError."""
    sizes = [path.stat().st_size for path in files]
    whole = sum(sizes) <= WHOLE
    for path, size in zip(files, sizes, strict=True):
        name = path.relative_to(folder).as_posix()
        h.update(tlv(("file", name.encode()), ("size", str(size).encode())))
        for piece in _content(path, size, whole=whole or size <= STRIP * STRIPS):
            h.update(piece)


def _content(path: Path, size: int, *, whole: bool) -> Iterator[bytes]:
    """All of a file, or its strips."""
    if whole:
        parts = [(at, min(PIECE, size - at)) for at in range(0, size, PIECE)]
    else:
        parts = [(at, STRIP) for at in strip_starts(size)]
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for at, n in parts:
            while n:
                piece = os.pread(fd, n, at)
                if not piece:
                    raise OSError(f"{path} became shorter while it was read")
                yield piece
                at, n = at + len(piece), n - len(piece)
    finally:
        os.close(fd)
