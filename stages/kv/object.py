"""TLM1: how one chunk's KV is written, in memory, on disk and on a wire.

A header (4 KiB, or the next multiple when a model has very many layers), then one frame per layer
group, each aligned to 4 KiB. Little-endian; parsed with `struct`; nothing is ever unpickled. The
header carries its own checksum and one for every frame, so no byte is believed unverified.

A progressive codec writes several scans, each a frame per layer group: all groups coarsely, then
what makes them finer. So a part of the object, from its start, is all of it at a coarser level.

    offset size field
         0    4 magic "TLM1"
         4    2 version: 1, or 2 where the text is there, too
         6    2 flags (bit 0: native order)
         8    8 header_bytes
        16    8 xxh3-64 of the header, with this field zero
        24    8 object_bytes, header and padding included
        32   32 key
        64   32 namespace digest
        96   32 parent link (the prefix under which this KV was captured)
       128   32 sha256 of the tokens as little-endian int32
       160   40 tokens, grain, group, kv, layers, heads, dim, block_tokens, dtype, frames, links,
                scans beyond the first
       200   .. frames x 40: offset, stored bytes, raw bytes, xxh3-64 of the stored bytes, codecs
        ..   .. links x 32: the chain's grain links inside the chunk, the last of which is the key
        ..   .. version 2: the chunk's text, as `text.py` packs it; zero padded
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import chain
from typing import NamedTuple

import xxhash

from tierloom.stages.errors import Damaged, Lost, Unreadable
from tierloom.stages.kv.geometry import DTYPES, Geometry
from tierloom.stages.kv.text import Text, text_bytes, unpack_text
from tierloom.stages.memory.allocator import PAGE, aligned
from tierloom.stages.memory.arena import Lease

LINK = 32
"""Bytes of a link, of a key and of every digest here."""

_MAGIC, _VERSIONS, _NATIVE = b"TLM1", (1, 2), 1
_NAMES = ("", *DTYPES)
_FIXED = struct.Struct("<4sHHQQQ32s32s32s32sIIHHHHIIHHHH8x")
_FRAME = struct.Struct("<QQQQ8s")
_START = struct.Struct("<4sHHQ")
_CHECK_AT = 16


class Frame(NamedTuple):
    """One layer group's bytes inside an object."""

    offset: int
    """From the object's start; a multiple of 4096."""
    stored: int
    """Bytes as written, padding not counted."""
    raw: int
    """Bytes once decoded."""
    checksum: int = 0
    """xxh3-64 of the stored bytes."""
    codecs: bytes = b""
    """Codec ids in the order they were applied, at most eight."""


class Header(NamedTuple):
    """What an object says of itself. `frames` in layer order, `group` layers each, scan by scan."""

    key: bytes
    namespace: bytes
    parent: bytes
    token_digest: bytes
    tokens: int
    grain: int
    group: int
    geometry: Geometry
    frames: tuple[Frame, ...]
    links: bytes
    scans: int = 1
    packed_text: bytes = b""
    """What the KV was computed from, as `pack_text` makes it; empty: it is not said."""

    @property
    def text(self) -> Text | None:
        """What the KV was computed from; None: it is not said."""
        return unpack_text(self.packed_text, self.parent) if self.packed_text else None

    @property
    def groups(self) -> int:
        """Layer groups, which are the frames of one scan."""
        return -(-self.geometry.layers // self.group) if self.group else 0

    @property
    def nbytes(self) -> int:
        """The object's length: a multiple of 4096."""
        last = self.frames[-1] if self.frames else Frame(self.header_bytes, 0, 0)
        return last.offset + aligned(last.stored)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Bytes from the object's start to the end of its header, of frame 0, of frame 1, ..."""
        return (self.header_bytes, *(f.offset + aligned(f.stored) for f in self.frames))

    @property
    def header_bytes(self) -> int:
        return header_size(len(self.frames), len(self.links) // LINK, len(self.packed_text))

    def with_frames(self, raw: Sequence[int], stored: Sequence[int], scans: int = 1) -> Header:
        """The same chunk with its frames written otherwise; no checksum, no codec."""
        size = header_size(len(raw), len(self.links) // LINK, len(self.packed_text))
        return self._replace(frames=plan_frames(size, raw, stored), scans=scans)

    def pack(self) -> bytes:
        """The header as bytes, zero padded to `header_bytes`."""
        g, size = self.geometry, self.header_bytes
        fixed = _FIXED.pack(
            _MAGIC, _VERSIONS[bool(self.packed_text)], _NATIVE if g.native else 0, size, 0,
            self.nbytes,
            self.key, self.namespace, self.parent, self.token_digest,
            self.tokens, self.grain, self.group, g.kv, g.layers, g.heads, g.dim, g.block_tokens,
            _NAMES.index(g.dtype), len(self.frames), len(self.links) // LINK, self.scans - 1,
        )  # fmt: skip
        table = _table(len(self.frames)).pack(*chain.from_iterable(self.frames))
        page = bytearray((fixed + table + self.links + self.packed_text).ljust(size, b"\0"))
        struct.pack_into("<Q", page, _CHECK_AT, xxhash.xxh3_64_intdigest(page))
        return bytes(page)

    @staticmethod
    def length(page: bytes | memoryview) -> int:
        """`header_bytes` as the first page claims it, so that a reader knows how much to fetch.

        `page` may be what there is of one: the format is told before any length is judged. Raises
        Unreadable (a later format), Damaged (it cannot begin an object).
        """
        start = bytes(page[: _START.size]).ljust(_START.size, b"\0")
        magic, version, _, size = _START.unpack(start)
        if is_later(magic, _MAGIC) or (magic == _MAGIC and version > _VERSIONS[-1]):
            if _one_bit_turned(page, start):
                raise Damaged("a bit of its version was turned")
            text = f"{magic.decode(errors='replace')}, version {version}"
            raise Unreadable(Lost.NEWER, f"written as {text}: TLM1, up to version 2, is read here")
        if magic != _MAGIC:
            raise Damaged(f"not an object: magic is {magic!r}, not {_MAGIC!r}")
        if version not in _VERSIONS:
            raise Damaged(f"there was never a version {version} of objects")
        if not PAGE <= size <= 64 * PAGE or size % PAGE:
            raise Damaged(f"header length {size} is impossible")
        return int(size)

    @classmethod
    def unpack(cls, raw: bytes | memoryview, *, key: bytes = b"", namespace: bytes = b"") -> Header:
        """Parse and check a header. Raises Damaged where it contradicts itself or its name, and
        Unreadable where it is another's: of a later format, or of another namespace.

        `key` and `namespace`, when given, are what the reader asked for: an object that is whole
        but another one of the namespace (two were swapped on disk) is as bad as a torn one. Without
        a namespace, `key` may also be what `name_of` says.
        """
        size = cls.length(raw)
        if len(raw) < size:
            raise Damaged(f"header cut short: {len(raw)} of {size} bytes")
        page = bytearray(raw[:size])
        if not _has_checksum(page):
            raise Damaged("header checksum does not match")
        (
            _, version, flags, _, _, nbytes, own, space, parent, digest,
            tokens, grain, group, kv, layers, heads, dim, block, dtype, nframes, nlinks, finer,
        ) = _FIXED.unpack_from(page)  # fmt: skip
        if namespace and space != namespace:
            raise Unreadable(Lost.FOREIGN, f"an object of another namespace, {space.hex()[:16]}")
        if key and own != key and (namespace or name_of(space, own) != key):
            raise Damaged(f"holds object {own.hex()[:16]}, not {key.hex()[:16]}")
        at = _FIXED.size
        text = text_bytes(tokens) if version > 1 else 0
        inside = at + nframes * _FRAME.size + nlinks * LINK + text <= size
        if not inside or not block or not dtype:
            raise Damaged("header fields contradict each other")
        if flags & ~_NATIVE:
            raise Unreadable(Lost.NEWER, f"an object of flags {flags:#x}, which are not known here")
        if dtype >= len(_NAMES):
            raise Unreadable(Lost.NEWER, f"an object of data type {dtype}, which is not known here")
        frames = []
        for i in range(nframes):
            offset, stored, plain, xxh, codecs = _FRAME.unpack_from(page, at + i * _FRAME.size)
            frames.append(Frame(offset, stored, plain, xxh, codecs.rstrip(b"\0")))
        at += nframes * _FRAME.size
        end = at + nlinks * LINK
        header = cls(
            key=own, namespace=space, parent=parent, token_digest=digest,
            tokens=tokens, grain=grain, group=group, frames=tuple(frames),
            geometry=Geometry(
                kv=kv, layers=layers, heads=heads, dim=dim, dtype=_NAMES[dtype],
                block_tokens=block, native=bool(flags & _NATIVE),
            ),
            links=bytes(page[at:end]), scans=1 + finer, packed_text=bytes(page[end : end + text]),
        )  # fmt: skip
        header._check_frames(nbytes, size)
        return header

    def _check_frames(self, nbytes: int, header_bytes: int) -> None:
        """Raise Damaged unless frames lie in order, apart, inside the object, one per group and
        scan."""
        groups = self.groups
        if not groups or len(self.frames) != groups * self.scans:
            raise Damaged("frame count does not match the layers")
        if not self.tokens or not self.links or self.links[-LINK:] != self.key:
            raise Damaged("links do not end in the key")
        end = header_bytes
        for i, f in enumerate(self.frames):
            layers = min(self.group, self.geometry.layers - i % groups * self.group)
            if (
                f.offset != end
                or not f.stored
                or f.raw != self.geometry.frame_bytes(layers, self.tokens)
            ):
                raise Damaged(f"frame {i} contradicts the geometry")
            if not f.codecs and (f.stored != f.raw or self.scans > 1):
                raise Damaged(f"frame {i} is plain but {f.stored} of {f.raw} bytes long")
            end = f.offset + aligned(f.stored)
        if end != nbytes:
            raise Damaged(f"object length {nbytes} does not match its frames ({end})")


def _one_bit_turned(page: bytes | memoryview, start: bytes) -> bool:
    """Whether a header that calls itself later than ours is one of ours with one bit turned: with
    that bit as it should be, its checksum holds."""
    size = _START.unpack(start)[3]
    for version in _VERSIONS if PAGE <= size <= min(len(page), 64 * PAGE) else ():
        ours = struct.pack("<4sH", _MAGIC, version)
        turned = int.from_bytes(ours, "little") ^ int.from_bytes(start[: len(ours)], "little")
        header = bytearray(page[:size])
        header[: len(ours)] = ours
        if turned.bit_count() == 1 and _has_checksum(header):
            return True
    return False


def _has_checksum(header: bytearray) -> bool:
    """Whether a header's checksum is right; afterwards it is zero."""
    (check,) = struct.unpack_from("<Q", header, _CHECK_AT)
    struct.pack_into("<Q", header, _CHECK_AT, 0)
    return bool(xxhash.xxh3_64_intdigest(header) == check)


def is_later(magic: bytes, ours: bytes) -> bool:
    """Whether a magic is that of a later format than ours: they differ in the last byte only."""
    return magic[:-1] == ours[:-1] and magic > ours


def name_of(namespace: bytes, key: bytes) -> bytes:
    """What an object is called where those of many namespaces are kept: the ranks of one model
    keep other bytes under one key."""
    return sha256(namespace + key).digest()


@lru_cache(64)
def _table(frames: int) -> struct.Struct:
    return struct.Struct("<" + _FRAME.format.lstrip("<") * frames)


def header_size(frames: int, links: int, text: int = 0) -> int:
    """Bytes of a header with this many frames, links and bytes of text: one page, unless they are
    very many."""
    return aligned(_FIXED.size + frames * _FRAME.size + links * LINK + text)


def plan_frames(header_bytes: int, raw: Sequence[int], stored: Sequence[int]) -> tuple[Frame, ...]:
    """Lay frames one after another after a header, each on a page."""
    frames, at = [], header_bytes
    for plain, size in zip(raw, stored, strict=True):
        frames.append(Frame(at, size, plain))
        at += aligned(size)
    return tuple(frames)


def object_bytes(g: Geometry, tokens: int, grain: int, group: int) -> int:
    """Most bytes of a plain object of `tokens` tokens, its text included."""
    raw = [g.frame_bytes(min(group, g.layers - at), tokens) for at in range(0, g.layers, group)]
    size = header_size(len(raw), -(-tokens // grain), text_bytes(tokens))
    last = plan_frames(size, raw, raw)[-1]
    return last.offset + aligned(last.stored)


@dataclass(slots=True)
class Object:
    """A header and the lease that holds (or will hold) the bytes it describes.

    The lease is counted: whoever keeps an Object keeps a reference (`lease.retain()`) and gives
    it back. `loaded` counts the frames whose bytes have arrived, from the first one on.
    """

    header: Header
    lease: Lease
    loaded: int = 0
    sealed: bool = False
    source: object = None
    """By what its tier knows it again, when it is to read on."""

    @property
    def arrived(self) -> int:
        """Bytes that have come, header included."""
        return self.bytes_upto(self.loaded)

    def bytes_upto(self, frame: int) -> int:
        """Bytes of the object up to, not including, this frame; 0 where it is the first."""
        if not frame:
            return 0
        last = self.header.frames[min(frame, len(self.header.frames)) - 1]
        return last.offset + last.stored

    def seal(self, checksums: Sequence[int]) -> None:
        """Write the header in front of the frames. The bytes are then a whole object."""
        frames = tuple(
            [
                Frame(f.offset, f.stored, f.raw, c, f.codecs)
                for f, c in zip(self.header.frames, checksums, strict=True)
            ]
        )
        self.header = self.header._replace(frames=frames)
        page = self.header.pack()
        self.lease.view[: len(page)] = page
        self.loaded, self.sealed = len(frames), True
