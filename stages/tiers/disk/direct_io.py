"""Segment files: preallocated, addressed as one range of bytes, read and written without copies.

An object lies in a few *pieces*, (offset, bytes) each, which may cross the ends of segments. I/O is
direct where the file system can, so that the page cache is left to others; elsewhere it is
buffered, and the kernel is told that the pages are not wanted again. Nothing here is thread-safe
but `read` and `write`, which block and free the GIL.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from tierloom.stages.errors import ConfigError, Damaged
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.disk.set_aside import numbers

SegmentPiece = tuple[int, int]


log = logging.getLogger(__name__)

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a place that may be read, and not written."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, quota or file."""
_MINIMUM = 1 << 20  # smaller growth is not worth a call


def read_all(fd: int, view: memoryview, at: int) -> None:
    """Fill `view` from `at` on. Raises Damaged at the end of the file, OSError."""
    while view:
        count = os.preadv(fd, [view], at)
        if not count:
            raise Damaged("the file ends inside the object")
        view, at = view[count:], at + count


def write_all(fd: int, view: memoryview, at: int) -> None:
    """Write all of `view` at `at`. Raises OSError."""
    while view:
        count = os.pwritev(fd, [view], at)
        view, at = view[count:], at + count


class FileIO:
    """Moves bytes between files and memory; here by system calls. Blocks and frees the GIL."""

    def open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        """A file descriptor, to be given back to `close`. Raises OSError."""
        return os.open(path, flags, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    def read(self, fd: int, view: memoryview, at: int) -> None:
        """Fill `view` from `at` on. Raises Damaged at the end of the file, OSError, TierDown."""
        read_all(fd, view, at)

    def write(self, fd: int, view: memoryview, at: int) -> None:
        """Write all of `view` at `at`. Raises OSError, TierDown."""
        write_all(fd, view, at)


SYSTEM = FileIO()


def begins_with(file_io: FileIO, fd: int, head: memoryview) -> bool:
    """Whether a file begins with these pages. Raises what `FileIO.read` does."""
    with mmap.mmap(-1, len(head)) as pages, memoryview(pages) as there:  # aligned, for O_DIRECT
        file_io.read(fd, there, 0)
        return there == head


def can_direct(folder: Path) -> bool:
    """Whether a page goes through O_DIRECT there and back."""
    probe = folder / ".direct"
    try:
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError:
        with suppress(OSError):  # some file systems create first and refuse then
            probe.unlink(missing_ok=True)
        return False
    try:
        with mmap.mmap(-1, PAGE) as page, memoryview(page) as view:
            write_all(fd, view, 0)
            read_all(fd, view, 0)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)
        probe.unlink(missing_ok=True)


def want_direct(folder: Path, direct: bool | Literal["auto"]) -> bool:
    """What `direct` means in this folder. Raises ConfigError when it cannot be had."""
    able = direct is not False and can_direct(folder)
    if direct is True and not able:
        raise ConfigError(
            f"{folder}: no O_DIRECT on this file system; set direct: auto, or choose another path"
        )
    return able


class Segments:
    """The files `segment-00000.slab` and so on, `segment` bytes each, `capacity` in all."""

    def __init__(
        self, folder: Path, segment: int, capacity: int, *, direct: bool, file_io: FileIO = SYSTEM
    ) -> None:
        """Open what is there; what lies beyond `capacity` is cut off. Raises OSError."""
        self._folder, self._segment, self._capacity = folder, segment, capacity
        self._direct, self._file_io = direct, file_io
        self.sizes = [0] * -(-capacity // segment)
        """Bytes there are of each segment."""
        self._fds: dict[int, int] = {}
        self._read_only: dict[int, int] = {}
        """Of those, what was opened for reading, and those that others may still read from."""
        self._reopening = threading.Lock()
        self._told = False
        for number in numbers(folder, "segment", "slab"):
            if number >= len(self.sizes):
                with suppress(OSError):  # read-only
                    self._path(number).unlink()
                continue
            fd = self._open(number)
            size = os.fstat(fd).st_size
            if size > self._wanted(number):
                size = self._wanted(number)
                with suppress(OSError):
                    os.ftruncate(fd, size)
            self.sizes[number] = size // PAGE * PAGE

    def grow(self, nbytes: int, keep_free: int) -> tuple[int, int] | None:
        """Add to the first segment that is not whole; (offset, bytes), or None at the end.

        Leaves `keep_free` bytes of the file system to others, and adds no less than 1 MiB or
        `nbytes`, except at the very end.
        """
        gaps = self.missing()
        if not gaps:
            return None
        offset, missing = gaps[0]
        number, size = divmod(offset, self._segment)
        stat = os.statvfs(self._folder)
        spare = (stat.f_bavail * stat.f_frsize - keep_free) // PAGE * PAGE
        if spare < min(missing, max(nbytes, _MINIMUM)):
            if not self._told:  # once: from now on it lives with the room that it has
                self._told = True
                log.warning(
                    "disk tier at %s stops growing: %d bytes are free, keep_free is %d",
                    *(self._folder, stat.f_bavail * stat.f_frsize, keep_free),
                )
            return None
        added = min(missing, spare)
        self._open(number)
        fd = self._writable(number)
        try:
            os.posix_fallocate(fd, size, added)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            os.ftruncate(fd, size)
            return None
        self.sizes[number] = size + added
        return offset, added

    def missing(self) -> list[tuple[int, int]]:
        """What of the range is not there yet, as (offset, bytes) in order."""
        return [
            (number * self._segment + size, self._wanted(number) - size)
            for number, size in enumerate(self.sizes)
            if size < self._wanted(number)
        ]

    def read(self, pieces: Sequence[SegmentPiece], view: memoryview, start: int, end: int) -> None:
        """Bytes `start` to `end` of the object in `pieces`, to the same place in `view`."""
        for fd, at, begin, stop in self._parts(pieces, start, end):
            self._file_io.read(fd, view[begin:stop], at)
            self._forget(fd, at, stop - begin)

    def write(self, pieces: Sequence[SegmentPiece], view: memoryview) -> None:
        for number in list(self._read_only):
            self._writable(number)
        for fd, at, begin, stop in self._parts(pieces, 0, len(view)):
            self._file_io.write(fd, view[begin:stop], at)
            self._forget(fd, at, stop - begin)

    def sync(self) -> None:
        for fd in list(self._fds.values()):
            os.fdatasync(fd)

    def close(self) -> None:
        for fd in {*self._fds.values(), *self._read_only.values()}:
            self._file_io.close(fd)
        self._fds.clear()
        self._read_only.clear()

    def _parts(
        self, pieces: Sequence[SegmentPiece], start: int, end: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """(file, place in it, begin and end in the object) of the pieces between start and end."""
        low = 0
        for offset, nbytes in pieces:
            begin, last = max(start, low), min(end, low + nbytes)
            while begin < last:
                number, at = divmod(offset + begin - low, self._segment)
                stop = min(last, begin + self._segment - at)
                yield self._fds[number], at, begin, stop
                begin = stop
            low += nbytes

    def _forget(self, fd: int, at: int, nbytes: int) -> None:
        if not self._direct:
            os.posix_fadvise(fd, at, nbytes, os.POSIX_FADV_DONTNEED)

    def _wanted(self, number: int) -> int:
        return min(self._segment, self._capacity - number * self._segment)

    def _open(self, number: int) -> int:
        if number not in self._fds:
            try:
                fd = self._opened(number, os.O_RDWR | os.O_CREAT)
            except OSError as error:
                if error.errno not in READ_ONLY or not self._path(number).exists():
                    raise
                fd = self._read_only[number] = self._opened(number, os.O_RDONLY)
            self._fds[number] = fd
        return self._fds[number]

    def _writable(self, number: int) -> int:
        """Its file, open for writing. Raises OSError where that may still not be."""
        with self._reopening:
            if self._fds[number] == self._read_only.get(number):
                self._fds[number] = self._opened(number, os.O_RDWR)
            return self._fds[number]

    def _opened(self, number: int, flags: int) -> int:
        direct = os.O_DIRECT if self._direct else 0
        return self._file_io.open(self._path(number), flags | direct, 0o600)

    def _path(self, number: int) -> Path:
        return self._folder / f"segment-{number:05}.slab"
