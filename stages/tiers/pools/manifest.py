"""How an object is split into pieces, and the manifest that lists them."""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from tierloom.stages.errors import Damaged, Lost, Unreadable
from tierloom.stages.kv.object import is_later
from tierloom.stages.memory.allocator import PAGE

_MAGIC = b"TLR1"
_HEAD = struct.Struct("<4s8sI")
_LARGEST = 1 << 40


class Piece(NamedTuple):
    """A piece, and the memory it is read into or written from."""

    name: str
    address: int
    nbytes: int


class Manifest(NamedTuple):
    """The pieces of an object."""

    writer: bytes
    """Eight bytes, drawn for each put."""
    boundaries: tuple[int, ...]
    """Bytes to the end of the header, of frame 0, of frame 1, ...; the last is the length."""

    def pack(self) -> bytes:
        made = _HEAD.pack(_MAGIC, self.writer, len(self.boundaries))
        made += struct.pack(f"<{len(self.boundaries)}Q", *self.boundaries)
        return made + xxhash.xxh3_64_digest(made)

    @classmethod
    def unpack(cls, raw: bytes) -> Manifest:
        """Raises Damaged, or Unreadable if it is of a later format."""
        if is_later(raw[:4], _MAGIC):
            if xxhash.xxh3_64_digest(_MAGIC + raw[4:-8]) == raw[-8:]:
                raise Damaged("a manifest's format was turned: it was written as ours")
            raise Unreadable(Lost.NEWER, f"a manifest of format {raw[:4]!r}: TLR1 is read here")
        if len(raw) < _HEAD.size + 8 or xxhash.xxh3_64_digest(raw[:-8]) != raw[-8:]:
            raise Damaged("a manifest's checksum does not match")
        magic, writer, count = _HEAD.unpack_from(raw)
        if magic != _MAGIC or count < 2 or len(raw) != _HEAD.size + 8 * count + 8:
            raise Damaged("a manifest's fields contradict each other")
        ends = struct.unpack_from(f"<{count}Q", raw, _HEAD.size)
        steps = [b - a for a, b in zip((0, *ends), ends, strict=False)]
        if ends[-1] > _LARGEST or any(step <= 0 or step % PAGE for step in steps):
            raise Damaged("a manifest's frame boundaries are impossible")
        return cls(writer, ends)

    def names(
        self, key: bytes, piece: int, first: int = 0, last: int | None = None
    ) -> list[tuple[str, int, int]]:
        """(name, offset, bytes) of the pieces of parts `first` to `last`, or of all; part 0 is the
        header."""
        found = []
        for part in range(first, len(self.boundaries) if last is None else last):
            at, end = (self.boundaries[part - 1] if part else 0), self.boundaries[part]
            while at < end:
                size = min(piece, end - at)
                found.append((f"{key.hex()}/{self.writer.hex()}/{at:x}", at, size))
                at += size
        return found
