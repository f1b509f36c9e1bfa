"""How bytes move between files and memory; past the page cache where a file system can (O_DIRECT).

Everything here blocks, and frees the GIL.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from tierloom.stages.errors import ConfigError, Damaged
from tierloom.stages.memory.allocator import PAGE

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a place that may be read, and not written."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, quota or file."""
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]


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


def reserve(fd: int, at: int, nbytes: int) -> None:
    """Have a file reach from `at` on for `nbytes`, which are the file's on the disk where the file
    system can promise that. NFS before 4.2, FUSE and others cannot; glibc would then write a byte
    into each block, which O_DIRECT refuses and a network has to carry. Raises OSError."""
    while _fallocate(fd, 0, at, nbytes):
        error = ctypes.get_errno()
        if error in _CANNOT:
            os.ftruncate(fd, max(os.fstat(fd).st_size, at + nbytes))
            return
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


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
