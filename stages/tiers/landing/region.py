"""Memory that other processes write into, and that can be taken away from all of them at once."""

from __future__ import annotations

import ctypes
import mmap
import os

from tierloom.stages.memory.allocator import Space, aligned

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FIXED, _FAILED = 0x10, ctypes.c_void_p(-1).value
_NO_RESERVE, _DONT_FORK = 0x4000, 10


class LandingRegion:
    """A file in memory, mapped once; pages are taken as they are written. Not thread-safe."""

    def __init__(self, nbytes: int) -> None:
        """Raises OSError."""
        self.total = aligned(nbytes)
        fd = os.memfd_create("tierloom-landing", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.total)
            self.address = _map(None, self.total, 3, mmap.MAP_SHARED, fd)
        finally:
            os.close(fd)
        _LIBC.madvise(self.address, self.total, _DONT_FORK)
        self.space = Space(self.total)

    def bytes_at(self, offset: int, nbytes: int) -> bytes:
        """A copy of what lies there."""
        assert 0 <= offset <= offset + nbytes <= self.total
        return ctypes.string_at(self.address + offset, nbytes)

    def retire(self) -> None:
        """Give the memory back and keep its addresses, without access, until the process ends:
        whoever still writes there fails, and nothing else is ever put there."""
        flags = _FIXED | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        _map(self.address, self.total, 0, flags, -1)

    def close(self) -> None:
        """Give memory and addresses back: nobody writes there any more."""
        _LIBC.munmap(self.address, self.total)


def _map(address: int | None, nbytes: int, access: int, flags: int, fd: int) -> int:
    made = _LIBC.mmap(address, nbytes, access, flags, fd, 0)
    if made is None or made == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map {nbytes} bytes to land in: {os.strerror(code)}")
    return int(made)
