"""How an object is kept in Redis: a manifest, and pieces of about a MiB.

    tierloom:NAMESPACE:{KEY}            the manifest: 24 bytes, then the object's header
    tierloom:NAMESPACE:{KEY}:WRITE:0    the bytes after the header, first piece
    tierloom:NAMESPACE:{KEY}:WRITE:1    ...

A server moves pieces several times faster than values of 32 MiB. WRITE is a random word of
the writer, so that two writers of the same object never mix theirs; the manifest, which names it,
is written last and by one of them only, when all its pieces are there. Until then they live for
five minutes, so what a killed writer left expires. The braces keep all of an object on
one node of a cluster. A piece that was evicted makes the object a miss, and the rest is dropped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from tierloom.stages.errors import BadObject, Damaged, Lost, Unreadable
from tierloom.stages.kv.object import Header, is_later
from tierloom.stages.tiers.redis.resp import Reply, command

GRACE = 300_000
"""Milliseconds that a piece lives without a manifest."""
MANIFEST = 24
"""Bytes of a manifest before the header."""
LARGEST = MANIFEST + 64 * 4096
"""Bytes of the largest manifest: headers have 64 pages at most."""
_FIXED = struct.Struct("<4sIQ8s")
_MAGIC = b"TLR1"

# KEYS: manifest, pieces. 1: kept; 2: it was there already; 0: a piece is gone. Then ours are, too.
_COMMIT = """
local ms, kept = tonumber(ARGV[2]), 1
for i = 2, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then kept = 0 break end
end
if kept == 1 then
  local set
  if ms > 0 then set = redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ms)
  else set = redis.call('SET', KEYS[1], ARGV[1], 'NX') end
  if not set then kept = 2 end
end
for i = 2, #KEYS do
  if kept ~= 1 then redis.call('UNLINK', KEYS[i])
  elseif ms > 0 then redis.call('PEXPIRE', KEYS[i], ms)
  else redis.call('PERSIST', KEYS[i]) end
end
return kept
"""
# The manifest is that of this write still: forget it with its pieces, or have all live longer.
_SAME = "if redis.call('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) ~= ARGV[1] then return 0 end\n"
_DROP = _SAME + "for i = 1, #KEYS do redis.call('UNLINK', KEYS[i]) end return 1"
_DROP_EMPTY = "return redis.call('STRLEN', KEYS[1]) == 0 and redis.call('UNLINK', KEYS[1]) or 0"
_RENEW = _SAME + "for i = 1, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[2]) end return 1"


class Manifest(NamedTuple):
    """Where an object's bytes are."""

    name: bytes
    """The key that it is kept under."""
    write: bytes
    """The writer's word, 8 bytes."""
    nbytes: int
    """Of the object, header included."""
    piece: int
    head: int
    """Bytes of the header, which no piece holds."""

    @classmethod
    def unpack(cls, name: bytes, raw: bytes, head: int = 0) -> Manifest:
        """Its first 24 bytes; of them alone the header's length is not known. Raises Damaged, or
        Unreadable where it is one of a later format."""
        if is_later(raw[:4], _MAGIC):
            raise Unreadable(Lost.NEWER, f"a manifest of format {raw[:4]!r}: TLR1 is read here")
        if len(raw) < MANIFEST:
            raise Damaged(f"manifest cut short: {len(raw)} bytes")
        magic, piece, nbytes, write = _FIXED.unpack_from(raw)
        if magic != _MAGIC or not piece or nbytes > piece << 12 or head > nbytes:
            raise Damaged("not a manifest of an object")
        return cls(name, write, nbytes, piece, head)

    @property
    def prefix(self) -> bytes:
        return _FIXED.pack(_MAGIC, self.piece, self.nbytes, self.write)

    def names(self) -> list[bytes]:
        """The manifest's key and those of all pieces. Where the header's length is not known, one
        or two may be among them that never were."""
        count = -(-(self.nbytes - self.head) // self.piece)
        return [self.name, *map(self.name_of, range(count))]

    def name_of(self, number: int) -> bytes:
        return b"%b:%b:%d" % (self.name, self.write.hex().encode(), number)

    def parts(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Pieces that bytes `begin` to `end` of the object lie in: number, and which of them."""
        while begin < end:
            number = (begin - self.head) // self.piece
            stop = min(end, self.head + (number + 1) * self.piece)
            yield number, begin, stop
            begin = stop

    def ask(self, number: int, begin: int, stop: int) -> bytes:
        """The command for bytes `begin` to `stop`, all within one piece."""
        first = self.head + number * self.piece
        last = min(first + self.piece, self.nbytes)
        name = self.name_of(number)
        if (begin, stop) == (first, last):
            return command("GET", name)
        return command("GETRANGE", name, begin - first, stop - first - 1)

    def store(self, number: int, view: memoryview) -> tuple[bytes, memoryview, bytes]:
        """The command that keeps a piece, in parts."""
        name = self.name_of(number)
        head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, len(view))
        grace = b"%d" % GRACE
        return head, view, b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(grace), grace)

    def commit(self, header: memoryview, ttl: int) -> bytes:
        """Make the object visible for `ttl` milliseconds; 0: until it is evicted."""
        return self._script(_COMMIT, self.prefix + bytes(header), ttl)

    def drop(self) -> bytes:
        return self._script(_DROP, self.prefix)

    def renew(self, ttl: int) -> bytes:
        return self._script(_RENEW, self.prefix, ttl)

    def _script(self, text: str, *arguments: bytes | int) -> bytes:
        names = self.names()
        return command("EVAL", text, len(names), *names, *arguments)


def unpack_whole(
    name: bytes, raw: bytes, *, key: bytes, namespace: bytes
) -> tuple[Manifest, Header]:
    """A manifest with its header, both checked. Raises Damaged, Unreadable."""
    Manifest.unpack(name, raw)
    header = Header.unpack(memoryview(raw)[MANIFEST:], key=key, namespace=namespace)
    if len(raw) != MANIFEST + header.header_bytes:
        raise Damaged(f"a manifest of {len(raw)} bytes")
    manifest = Manifest.unpack(name, raw, header.header_bytes)
    if manifest.nbytes != header.nbytes:
        raise Damaged(f"a manifest for {manifest.nbytes} bytes, not {header.nbytes}")
    return manifest, header


def dropping(name: bytes, raw: Reply) -> tuple[bytes, int]:
    """The command that forgets what has this name as long as it begins with `raw`, its first 24
    bytes, and how many bytes of objects that are: 0 where it is not a manifest."""
    if not raw:  # an empty value: it exists for whoever asks
        return command("EVAL", _DROP_EMPTY, 1, name), 0
    if not isinstance(raw, bytes):
        return command("UNLINK", name), 0
    try:
        manifest = Manifest.unpack(name, raw)
    except BadObject:
        return command("EVAL", _DROP, 1, name, raw), 0
    return manifest.drop(), manifest.nbytes
