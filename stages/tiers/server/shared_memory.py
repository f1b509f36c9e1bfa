"""A server's memory, mapped into this process: a read is then a lease of it, and nothing is copied.

What is lent does not change until it is returned, or this process closes the connection or ends. So
the connection outlives its last loan, whatever happens to the server, and what a dead server lent
stays readable: nobody writes into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Sequence

import anyio

from tierloom.stages.errors import TierDown
from tierloom.stages.memory.arena import Lease, Slab
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.connection import Connection

_TOGETHER = 16
"""Most loans that are returned in one message."""


class SharedLease(Lease):
    """A lease of another process's memory; readers verify it as they do all objects."""

    __slots__ = ("id",)

    def __init__(self, slab: SharedMemory, loan: wire.Loan) -> None:
        super().__init__(slab, loan.offset, loan.nbytes)
        self.id = loan.id


class SharedMemory(Slab):
    """The mapped memory, and the connection by which it is borrowed. Leases may be released on any
    thread."""

    def __init__(self, connection: Connection, fd: int, nbytes: int) -> None:
        """Maps `nbytes` of `fd`, which the caller closes. Raises TierDown if the file could be
        truncated while mapped."""
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size < nbytes:
            raise TierDown("the server's memory is shorter than announced")
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise TierDown("the server's memory is not sealed")
        # Whole pages, of whatever size: what is mapped in part of one cannot be unmapped.
        whole = min(found.st_size, -(-nbytes // found.st_blksize) * found.st_blksize)
        self._map = mmap.mmap(fd, whole, mmap.MAP_SHARED, mmap.PROT_READ)
        import numpy as np  # not for those who only ask a directory

        address = np.frombuffer(self._map, np.uint8).ctypes.data
        super().__init__(address, memoryview(self._map)[:nbytes])
        self.nbytes = nbytes
        self.usable = True
        self._connection = connection
        self._turn = anyio.Lock()
        self._sending = threading.Lock()
        self._unsent = bytearray()
        self._number = 0
        self._out = 0
        self._returned: list[int] = []

    async def borrow(self, keys: Sequence[bytes]) -> list[wire.Loan]:
        """Ask for objects; each loan must become a `SharedLease` at once. Raises TierDown,
        OSError."""
        async with self._turn:
            if not self.usable:
                raise TierDown("the connection to the server's memory is closed")
            self._number = (self._number + 1) & 0xFFFFFFFF
            whole = False
            try:
                self._post(wire.message(wire.Kind.BORROW, self._number, b"".join(keys)))
                while self._unsent:
                    await anyio.wait_writable(self._connection.sock)
                    self._post(b"")
                answer = await self._connection.message(wire.OBJECTS * 32)
                if answer[:2] != (wire.Kind.LENT, self._number):
                    raise wire.BadMessage(f"unexpected {answer.kind.name} in reply to BORROW")
                loans = wire.loans_of(answer.body, len(keys), self.nbytes)
                whole = True
            finally:
                if (
                    not whole
                ):  # what may have been lent by now is returned by closing the connection
                    self.retire()
        with self.lock:
            self._out += sum(not loan.code for loan in loans)
        return loans

    def retire(self) -> None:
        """Stop borrowing; the connection is closed with the last loan."""
        with self.lock:
            self.usable = False
            last = not self._out
        if last:
            self._close()

    @property
    def is_there(self) -> bool:
        """It seems usable for loans."""
        return self.usable and (self._turn.locked() or self._connection.usable)

    def _release(self, lease: Lease) -> None:
        with self.lock:
            if lease.refs <= 0:
                raise RuntimeError("a lease was released twice")
            lease.refs -= 1
            if lease.refs:
                return
            self._out -= 1
            last = not self._out and not self.usable
            ids: list[int] = []
            if isinstance(lease, SharedLease):
                self._returned.append(lease.id)
            if not self._out or len(self._returned) >= _TOGETHER:
                ids, self._returned = self._returned, ids
        if last:
            self._close()
        elif ids:
            with contextlib.suppress(
                OSError
            ):  # hung up: the loans go with our end of the connection
                self._post(wire.message(wire.Kind.RETURN, 0, wire.pack_ids(ids)))

    def _post(self, message: bytes) -> None:
        """Send without blocking; from any thread. What remains is sent first the next time: it is
        little, as every loan is returned once."""
        with self._sending:
            self._unsent += message
            with contextlib.suppress(BlockingIOError):
                while self._unsent:
                    del self._unsent[: self._connection.sock.send(self._unsent)]

    def _close(self) -> None:
        self._connection.close()
        self.view.release()
        with contextlib.suppress(BufferError):  # a view was kept: the mapping goes with it
            self._map.close()
