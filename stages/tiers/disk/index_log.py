"""The disk tier's index on disk: a snapshot and the log of what happened since.

Both are files of records, each with its length and CRC, that are read up to the first bad one: a
torn tail costs what was last put, never more. Generation n's log goes on from its snapshot:

    index-00000007.snap    index-00000007.log    index-00000008.log (a snapshot 8 is being written)

    record   u32 length, u32 crc32 of the rest, u8 kind, body
    put      u8 pinned, u16 links, pieces, boundaries; f64 expires; links x 32,
             pieces x (u64 offset, u64 bytes), boundaries x u32 pages
    drop, pin, unpin     keys x 32
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tierloom.stages.kv.object import LINK
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.contract.index import Entry, split
from tierloom.stages.tiers.disk.set_aside import numbers

log = logging.getLogger(__name__)

PUT, DROP, PIN, UNPIN = 1, 2, 3, 4

_MAGIC = b"TLDX\x01\x00\x00\x00"
_RECORD = struct.Struct("<II")
_PUT = struct.Struct("<BBHHHd")
_PIECE = struct.Struct("<QQ")
_SMALL_LOG = 8 << 20  # bytes; a log this short is no reason for a snapshot
_ROOM = 1 << 16  # bytes that the file system must have, for records


@dataclass(slots=True)
class Extent:
    """Where an object lies, and where its frames end. Changed under the index's lock only."""

    pieces: list[tuple[int, int]]
    """(offset, bytes), one after another."""
    boundaries: tuple[int, ...]
    """Bytes from the object's start to the end of its header, of frame 0, of frame 1, ..."""
    readers: int = 0
    """Reads under way."""
    gone: bool = False
    """Deleted while read: the last reader frees the pieces."""


class IndexLog:
    """Append with `put`, `delete` and `later`, under the caller's lock. A place that cannot be
    written is no reason not to read: the log is begun with the first record then."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = -1
        self._generation = 0
        self._nbytes = 0
        self._snapshot_bytes = 0
        self._later: list[bytes] = []

    @property
    def long(self) -> bool:
        """The log is long enough for a snapshot."""
        return self._nbytes > max(_SMALL_LOG, self._snapshot_bytes)

    def load(self) -> list[Entry[Extent]]:
        """Read everything back, oldest first, and begin a new log. Blocks."""
        entries, self._generation = read_index(self._folder)
        with suppress(OSError):  # full, or read-only
            for stale in numbers(self._folder, "index", "tmp"):
                (self._folder / f"index-{stale:08}.tmp").unlink()
            self._begin(self._generation + 1)  # nothing is appended to a tail that may be torn
        return entries

    def put(self, entry: Entry[Extent]) -> None:
        """Raises OSError; nothing is written then."""
        self._append(_pack_put(entry))

    def delete(self, keys: Sequence[bytes]) -> None:
        """Raises OSError; nothing is written then."""
        self._append(bytes([DROP]) + b"".join(keys))

    def later(self, kind: int, keys: Sequence[bytes]) -> None:
        """Without I/O (pins are noted on the loop): written before the next record, or at the
        end."""
        self._later.append(bytes([kind]) + b"".join(keys))

    def require_room(self) -> None:
        """Raise OSError where the file system is full: who evicts for a put that is then refused
        has deleted for nothing."""
        stat = os.statvfs(self._folder)
        if stat.f_bavail * stat.f_frsize < _ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))

    def begin_snapshot(self) -> int:
        """Turn to a new log. What is in the index at this moment belongs into its snapshot."""
        self._flush()
        self._begin(self._generation + 1)
        return self._generation

    def write_snapshot(self, generation: int, entries: Iterable[Entry[Extent]]) -> None:
        """Make a snapshot durable, then remove what came before it. Needs no lock."""
        path = self._folder / f"index-{generation:08}.snap"
        fresh = path.with_suffix(".tmp")
        try:
            with fresh.open("wb") as file:
                file.write(_MAGIC)
                for entry in entries:
                    file.write(_framed(_pack_put(entry)))
                file.flush()
                os.fdatasync(file.fileno())
                self._snapshot_bytes = file.tell()
            fresh.replace(path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        sync_folder(self._folder)
        for suffix in ("snap", "log"):
            for old in numbers(self._folder, "index", suffix):
                if old < generation:
                    (self._folder / f"index-{old:08}.{suffix}").unlink()

    def close(self) -> None:
        """Write what is pending, and close. Idempotent."""
        if self._fd >= 0:
            with suppress(OSError):  # full: what was deleted is there again at the next start
                self._flush()
            os.close(self._fd)
            self._fd = -1

    @property
    def begun(self) -> bool:
        """Something may have been written since `load`."""
        return self._fd >= 0

    def _begin(self, generation: int) -> None:
        path = self._folder / f"index-{generation:08}.log"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        written = 0
        try:
            written = os.write(fd, _MAGIC)
        finally:
            if written != len(_MAGIC):
                os.close(fd)
                path.unlink(missing_ok=True)
        if written != len(_MAGIC):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._generation, self._nbytes = fd, generation, len(_MAGIC)

    def _append(self, body: bytes) -> None:
        if self._fd < 0:
            self._begin(self._generation + 1)
        self._flush()
        self._write(_framed(body))

    def _flush(self) -> None:
        while self._later:
            self._write(_framed(self._later[0]))
            del self._later[0]

    def _write(self, record: bytes) -> None:
        written = 0
        try:
            written = os.write(self._fd, record)
        finally:
            if written != len(record):  # what follows half a record would be lost
                os.ftruncate(self._fd, self._nbytes)
        if written != len(record):
            raise OSError(f"only {written} of {len(record)} bytes were written to the index log")
        self._nbytes += len(record)


def read_index(folder: Path) -> tuple[list[Entry[Extent]], int]:
    """(entries, oldest first; the last generation) as the files say. Changes nothing. Blocks."""
    entries: dict[bytes, Entry[Extent]] = {}
    snapshots = numbers(folder, "index", "snap")
    first = max(snapshots, default=0)
    logs = [n for n in numbers(folder, "index", "log") if n >= first]
    files = [f"index-{first:08}.snap"] if snapshots else []
    for name in files + [f"index-{n:08}.log" for n in logs]:
        for body in _records(folder / name):
            with suppress(struct.error, IndexError):  # whole, says its CRC: not of this version
                _apply(body, entries)
    return list(entries.values()), max([first, *logs])


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _framed(body: bytes) -> bytes:
    return _RECORD.pack(len(body), zlib.crc32(body)) + body


def _records(path: Path) -> Iterator[bytes]:
    """The bodies in a file, up to the first that is torn or wrong."""
    raw = path.read_bytes()
    at = len(_MAGIC)
    if raw[:at] != _MAGIC:
        log.warning("index file not readable: its objects are forgotten", extra={"path": str(path)})
        return
    while at + _RECORD.size <= len(raw):
        nbytes, crc = _RECORD.unpack_from(raw, at)
        at += _RECORD.size
        body = raw[at : at + nbytes]
        if not nbytes or len(body) < nbytes or zlib.crc32(body) != crc:
            break
        yield body
        at += nbytes
    else:
        if at == len(raw):
            return
    log.warning("index file ends in a bad record", extra={"path": str(path), "offset": at})


def _apply(body: bytes, entries: dict[bytes, Entry[Extent]]) -> None:
    """Do again what a record says; kinds from a newer version are passed over."""
    kind = body[0]
    if kind == PUT:
        entry = _unpack_put(body)
        entries.pop(entry.key, None)
        entries[entry.key] = entry
    elif kind == DROP:
        for key in split(body[1:]):
            entries.pop(key, None)
    elif kind in (PIN, UNPIN):
        for key in split(body[1:]):
            if key in entries:
                entries[key].pinned = kind == PIN


def _pack_put(entry: Entry[Extent]) -> bytes:
    pieces, pages = entry.place.pieces, [end // PAGE for end in entry.place.boundaries]
    counts = (len(entry.links) // LINK, len(pieces), len(pages))
    return b"".join(
        (
            _PUT.pack(PUT, entry.pinned, *counts, entry.expires),
            entry.links,
            *(_PIECE.pack(*piece) for piece in pieces),
            struct.pack(f"<{len(pages)}I", *pages),
        )
    )


def _unpack_put(body: bytes) -> Entry[Extent]:
    _, pinned, nlinks, npieces, nends, expires = _PUT.unpack_from(body)
    at = _PUT.size + nlinks * LINK
    links = body[_PUT.size : at]
    pieces = [_PIECE.unpack_from(body, at + i * _PIECE.size) for i in range(npieces)]
    pages = struct.unpack_from(f"<{nends}I", body, at + npieces * _PIECE.size)
    extent = Extent([(a, b) for a, b in pieces], tuple(n * PAGE for n in pages))
    return Entry(links[-LINK:], links, extent.boundaries[-1], extent, expires, bool(pinned))
