"""Descriptors of a disk tier's segment files: a few are open, however many files there are.

What was not used for longest is closed when another is wanted, and also when the process may open
no more, so that neither the tier nor its engine fails for what the tier keeps open. A file that
somebody else deleted is made again where bytes are to be written, and is missing where they are to
be read.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tierloom.stages.tiers.disk.direct_io import READ_ONLY, FileIO

log = logging.getLogger(__name__)

OPEN = 56
"""Most segment files open at once, but for those in use; with its other files a tier has 64."""
_NO_MORE = (errno.EMFILE, errno.ENFILE)


@dataclass(slots=True)
class _Open:
    """An open file."""

    fd: int
    users: int = 0
    stale: bool = False
    """It is no more the file of this name: it is closed when its last user is done."""


class SegmentFiles:
    """Open files by number. Thread-safe; blocks."""

    def __init__(self, folder: Path, *, direct: bool, file_io: FileIO) -> None:
        self.direct = direct
        """Files are opened with O_DIRECT."""
        self._folder, self._file_io = folder, file_io
        self._open: OrderedDict[tuple[int, bool], _Open] = OrderedDict()
        """By number, and whether it may be written; the one used last is the last."""
        self._changed = threading.Condition()
        self._written: set[int] = set()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def path(self, number: int) -> Path:
        return self._folder / f"segment-{number:05}.slab"

    @contextmanager
    def opened(self, number: int, *, write: bool = False) -> Iterator[int]:
        """The descriptor of a segment; `write`: which is made where it is missing. Raises OSError:
        FileNotFoundError when somebody deleted it, and it was not open."""
        used = self._take(number, write)
        try:
            yield used.fd
        finally:
            with self._changed:
                used.users -= 1
                if used.stale and not used.users:
                    self._file_io.close(used.fd)
                self._changed.notify_all()

    def sync(self) -> None:
        """What was written is on the disk, whichever descriptor wrote it. Raises OSError."""
        with self._changed:
            written, self._written = self._written, set()
        try:
            for number in sorted(written):
                with suppress(FileNotFoundError), self.opened(number) as fd:
                    os.fdatasync(fd)
        except OSError:
            with self._changed:
                self._written |= written
            raise

    def use_page_cache(self, fd: int) -> None:
        """O_DIRECT is refused after all: do without, here and in what is opened from now on. Raises
        OSError."""
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        with self._changed:
            if not self.direct:
                return
            self.direct = False
        log.warning(
            "disk tier at %s goes on through the page cache: its file system refuses O_DIRECT now",
            self._folder,
        )

    def close(self) -> None:
        """Close all; nobody uses one any more."""
        with self._changed:
            for each in self._open.values():
                self._file_io.close(each.fd)
            self._open.clear()

    def _take(self, number: int, write: bool) -> _Open:
        with self._changed:
            if write:
                self._written.add(number)
            while True:
                found = self._found(number, write)
                if found is not None:
                    found.users += 1
                    return found
                while len(self._open) >= OPEN and self._close_one():
                    pass
                try:
                    self._open_file(number, write)
                except OSError as error:
                    if error.errno not in _NO_MORE:
                        raise
                    if self._close_one():
                        continue
                    if not self._open:
                        raise
                    self._changed.wait(1.0)  # all of ours are in use, each for one call

    def _found(self, number: int, write: bool) -> _Open | None:
        """An open file that will do, as the one used last."""
        for key in ((number, True), (number, False)):
            found = self._open.get(key)
            if found is None or (write and not key[1]):
                continue
            if write and not os.fstat(found.fd).st_nlink:  # what is written there would be lost
                self._drop(key)
                continue
            self._open.move_to_end(key)
            return found
        return None

    def _open_file(self, number: int, write: bool) -> None:
        """Raises OSError."""
        try:
            fd = self._opened(number, os.O_RDWR | (os.O_CREAT if write else 0))
            writable = True
        except OSError as error:
            if write or error.errno not in READ_ONLY:
                raise
            fd, writable = self._opened(number, os.O_RDONLY), False
        self._open[number, writable] = _Open(fd)

    def _opened(self, number: int, flags: int) -> int:
        path = self.path(number)
        if self.direct:
            try:
                return self._file_io.open(path, flags | os.O_DIRECT, 0o600)
            except OSError as error:  # compressed or encrypted files, on some file systems
                if error.errno != errno.EINVAL:
                    raise
        return self._file_io.open(path, flags, 0o600)

    def _close_one(self) -> bool:
        """Close what was not used for longest and is not in use; False: there is none."""
        key = next((key for key, each in self._open.items() if not each.users), None)
        if key is not None:
            self._drop(key)
        return key is not None

    def _drop(self, key: tuple[int, bool]) -> None:
        dropped = self._open.pop(key)
        dropped.stale = True
        if not dropped.users:
            self._file_io.close(dropped.fd)
