"""Segment files: preallocated, addressed as one range of bytes, read and written without copies.

An object lies in a few *pieces*, (offset, bytes) each, which may cross the ends of segments. I/O is
direct where the file system can, so that the page cache is left to others; elsewhere it is
buffered, and the kernel is told that the pages are not wanted again. Nothing here is thread-safe
but `read` and `write`, which block and free the GIL.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.disk.direct_io import NO_SPACE, SYSTEM, FileIO, reserve
from tierloom.stages.tiers.disk.segment_files import SegmentFiles
from tierloom.stages.tiers.disk.set_aside import numbers

SegmentPiece = tuple[int, int]

log = logging.getLogger(__name__)

_MINIMUM = 1 << 20  # smaller growth is not worth a call


class Segments:
    """The files `segment-00000.slab` and so on, `segment` bytes each, `capacity` in all."""

    def __init__(
        self, folder: Path, segment: int, capacity: int, *, direct: bool, file_io: FileIO = SYSTEM
    ) -> None:
        """Open what is there; what lies beyond `capacity` is cut off. Raises OSError."""
        self._folder, self._segment, self._capacity = folder, segment, capacity
        self._file_io = file_io
        self.files = SegmentFiles(folder, direct=direct, file_io=file_io)
        self.sizes = [0] * -(-capacity // segment)
        """Bytes there are of each segment."""
        self._told = False
        for number in numbers(folder, "segment", "slab"):
            path = self.files.path(number)
            if number >= len(self.sizes):
                with suppress(OSError):  # read-only
                    path.unlink()
                continue
            size = path.stat().st_size
            if size > self._wanted(number):
                size = self._wanted(number)
                with suppress(OSError):
                    os.truncate(path, size)
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
        with self.files.opened(number, write=True) as fd:
            try:
                reserve(fd, size, added)
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
        """Bytes `start` to `end` of the object in `pieces`, to the same place in `view`. Raises
        FileNotFoundError when somebody deleted a segment, Damaged when one ends before, OSError."""
        for number, at, begin, stop in self._parts(pieces, start, end):
            with self.files.opened(number) as fd:
                self._move(self._file_io.read, fd, view[begin:stop], at)

    def write(self, pieces: Sequence[SegmentPiece], view: memoryview) -> None:
        """Raises OSError."""
        for number, at, begin, stop in self._parts(pieces, 0, len(view)):
            with self.files.opened(number, write=True) as fd:
                self._move(self._file_io.write, fd, view[begin:stop], at)

    def sync(self) -> None:
        """Raises OSError."""
        self.files.sync()

    def close(self) -> None:
        self.files.close()

    def _move(
        self, how: Callable[[int, memoryview, int], None], fd: int, view: memoryview, at: int
    ) -> None:
        try:
            how(fd, view, at)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.files.direct:
                raise
            self.files.use_page_cache(fd)
            how(fd, view, at)
        if not self.files.direct:
            os.posix_fadvise(fd, at, len(view), os.POSIX_FADV_DONTNEED)

    def _parts(
        self, pieces: Sequence[SegmentPiece], start: int, end: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """(segment, place in it, begin and end in the object) of the pieces between start and
        end."""
        low = 0
        for offset, nbytes in pieces:
            begin, last = max(start, low), min(end, low + nbytes)
            while begin < last:
                number, at = divmod(offset + begin - low, self._segment)
                stop = min(last, begin + self._segment - at)
                yield number, at, begin, stop
                begin = stop
            low += nbytes

    def _wanted(self, number: int) -> int:
        return min(self._segment, self._capacity - number * self._segment)
