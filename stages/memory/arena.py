"""One slab of host memory per worker, split into leases with a byte budget.

The memory tier is this arena: an object there is a lease that the tier keeps. What a disk reads, a
socket receives or a kernel gathers lands in the place it is served from, so promotion copies
nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable

from tierloom.stages.errors import ArenaFull
from tierloom.stages.memory import page_lock
from tierloom.stages.memory.allocator import PAGE, Space, aligned
from tierloom.stages.memory.first_touch import FirstTouch, populate
from tierloom.stages.memory.memory_promises import MemoryPromises

HUGE = 2 << 20
_RESERVED = 0x4 | 21 << 26
"""MFD_HUGETLB, with pages of 2 MiB."""
_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE, since Linux 5.1


class Slab:
    """Memory that leases are pieces of; whoever releases the last reference of one tells it."""

    def __init__(self, address: int, view: memoryview) -> None:
        self.address, self.view = address, view
        self.lock = threading.Lock()

    def _release(self, lease: Lease) -> None:
        raise NotImplementedError

    def _trim(self, lease: Lease, nbytes: int) -> None:
        raise NotImplementedError(f"a lease of {type(self).__name__} stays as long as it is")


class Lease:
    """A piece of the arena, counted. The memory is good until the last `release()`.

    A device copy that reads or writes it must have been waited for before that.
    """

    __slots__ = ("arena", "kept", "nbytes", "offset", "refs")

    def __init__(self, arena: Slab, offset: int, nbytes: int) -> None:
        self.arena, self.offset, self.nbytes = arena, offset, nbytes
        self.refs = 1
        self.kept = 0
        """Memory tiers that hold it."""

    @property
    def address(self) -> int:
        return self.arena.address + self.offset

    def at(self, begin: int, nbytes: int) -> int:
        """The address of `nbytes` from `begin` on, for whoever gets no view. Raises ValueError
        where they are not all of this lease."""
        if not 0 <= begin <= begin + nbytes <= self.nbytes:
            raise ValueError(f"{nbytes} bytes at {begin} lie outside of a lease of {self.nbytes}")
        return self.arena.address + self.offset + begin

    @property
    def view(self) -> memoryview:
        """Bytes of the lease, writable in one's own arena; do not keep it beyond `release()`."""
        return self.arena.view[self.offset : self.offset + self.nbytes]

    def retain(self) -> Lease:
        with self.arena.lock:
            if self.refs <= 0:
                raise RuntimeError("a lease was retained after its last release")
            self.refs += 1
        return self

    def release(self) -> None:
        self.arena._release(self)

    def trim(self, nbytes: int) -> None:
        """Give back all but the first `nbytes`, once an encoder knows how little it needed."""
        self.arena._trim(self, aligned(nbytes))


class Arena(Slab):
    """`kept` bytes belong to memory tiers; `flight` bytes to requests under way.

    `flight` never exceeds `working`. Thread-safe. Pages are touched when first used, or ahead of
    that (`touch_ahead`), and huge pages are asked for, since first touches of small ones cost more
    than the copy into them. It belongs to this process alone: a child that is forked does not have
    it.
    """

    def __init__(
        self, working: int, kept: int = 0, *, huge_pages: bool = True, shared: bool = False
    ) -> None:
        """`working`: bytes for requests under way. `kept`: bytes that memory tiers may hold.

        `shared`: the slab is a file in memory, `fd`, that other processes can map, but neither
        write nor cut; where the kernel cannot promise that, it is not, and `fd` is -1. It has pages
        of 2 MiB where the system has reserved enough of them.
        """
        self.working = aligned(working)
        self.total = self.working + aligned(kept)
        self.fd = -1
        self._ahead: FirstTouch | None = None
        reserved = False
        # One huge page more, so that the slab can begin on a huge page's boundary.
        # Private: shared mappings get no huge pages, and the disk is slow into small ones.
        nbytes, skip = self.total + HUGE, 0
        if shared and huge_pages and (made := _sealed(-(-nbytes // HUGE) * HUGE, _RESERVED)):
            self.fd, self._map = made
            reserved = True
        elif shared and (made := _sealed(nbytes)) is not None:
            self.fd, self._map = made
        else:
            self._map = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge_pages and not reserved and hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        if hasattr(mmap, "MADV_DONTFORK"):
            # After a fork, the next write here moves a page that the child still has: a device or a
            # NIC that has locked it goes on with the old one. Newer kernels copy all of it instead.
            self._map.madvise(mmap.MADV_DONTFORK)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if self.fd < 0:  # in shared memory, the kernel sees to it
            skip = -start % HUGE
        super().__init__(start + skip, memoryview(self._map)[skip : skip + self.total])
        self.leases = 0
        self.reclaim: list[Callable[[], bool]] = []
        """Asked in turn to drop one object when no hole is long enough; False: nothing left."""
        self._space = Space(self.total)
        self._kept = 0
        self.promises = MemoryPromises(self.working)
        self._pinned = False

    @property
    def used(self) -> int:
        return self._space.used

    @property
    def pinned(self) -> bool:
        """A device reads and writes it directly, and no other memory."""
        return self._pinned

    @property
    def flight(self) -> int:
        """Bytes leased and kept by no tier."""
        return self.used - self._kept

    @property
    def idle(self) -> int:
        """Bytes that memory tiers have room for and do not use."""
        return self.total - self.working - self._kept

    def figures(self) -> dict[str, int]:
        """Bytes that are leased, those of them that no tier keeps, all there are; leases."""
        return {
            "used": self.used, "flight": self.flight, "total": self.total, "leases": self.leases,
        }  # fmt: skip

    def lease(self, nbytes: int, *, evict: bool = True) -> Lease:
        """Take page-aligned bytes, uninitialized. Waits for nobody: raises ArenaFull. `evict`: have
        tiers drop objects where no hole is long enough."""
        need = aligned(nbytes)
        while True:
            with self.lock:
                if self.flight + need > self.working:
                    raise ArenaFull(
                        f"{need} bytes asked, {self.flight} of {self.working} in flight: "
                        "raise budget.arena, or send less at once"
                    )
                offset = self._take(need)
                if offset is not None:
                    self.leases += 1
                    return Lease(self, offset, need)
            # The lock is free here: a tier that drops an object releases its lease.
            if not evict or not any(give_up() for give_up in self.reclaim):
                raise ArenaFull(f"no hole of {need} bytes left between leases in use")

    def keep(self, lease: Lease) -> None:
        """A memory tier takes the lease: it counts against the tier, no longer as in flight."""
        if lease.arena is not self:
            raise ValueError("this lease is of another's memory, which is not ours to keep")
        lease.retain()
        with self.lock:
            lease.kept += 1
            if lease.kept == 1:
                self._kept += lease.nbytes

    def unkeep(self, lease: Lease) -> None:
        """The tier gives it up; readers who still hold it keep the bytes alive."""
        with self.lock:
            lease.kept -= 1
            if not lease.kept:
                self._kept -= lease.nbytes
        lease.release()

    def pin(self, device: str) -> None:
        """Page-lock the slab for a CUDA device (`cuda:3`), once. Raises LayoutError."""
        if not self._pinned:
            page_lock.lock(self.address, self.total, device)
            self._pinned = True

    def touch_ahead(self) -> None:
        """Have a thread touch what was never used, little by little, as far as memory is free."""
        if self._ahead is None and not self._pinned:
            self._ahead = FirstTouch(self.address, self.total)

    def retire(self) -> None:
        """Close it; where leases are out, as somebody still reads or writes, it stays as it is."""
        if self._ahead is not None:
            self._ahead.stop()
        if not self.leases:
            self.close()

    def close(self) -> None:
        """Unmap. Every lease must have been released."""
        if self._ahead is not None:
            self._ahead.stop()
        if self.leases:
            raise RuntimeError(f"arena closed with {self.leases} leases still out")
        if self._pinned:
            page_lock.unlock(self.address)
            self._pinned = False
        self.view.release()
        with contextlib.suppress(BufferError):  # a view was kept: the mapping goes with it
            self._map.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._space = Space(0)

    def _release(self, lease: Lease) -> None:
        with self.lock:
            if lease.refs <= 0:
                raise RuntimeError("a lease was released twice")
            lease.refs -= 1
            if lease.refs:
                return
            self._give(lease.offset, lease.nbytes)
            self.leases -= 1

    def _trim(self, lease: Lease, nbytes: int) -> None:
        with self.lock:
            if not PAGE <= nbytes <= lease.nbytes:
                raise ValueError(f"cannot trim a lease of {lease.nbytes} bytes to {nbytes}")
            if nbytes < lease.nbytes:
                self._give(lease.offset + nbytes, lease.nbytes - nbytes)
                lease.nbytes = nbytes

    # Under the lock. What finds late writes (`tierloom.testing.PoisonArena`) overrides these.

    def _take(self, nbytes: int) -> int | None:
        return self._space.take(nbytes)

    def _give(self, offset: int, nbytes: int) -> None:
        self._space.give(offset, nbytes)


def _sealed(nbytes: int, flags: int = 0) -> tuple[int, mmap.mmap] | None:
    """A file in memory, mapped here and writable by nobody else; None where the system has none.
    `flags`: of huge pages, all of which it has then: one that a control group refuses later, when
    it is touched, would end the process."""
    try:
        fd = os.memfd_create("tierloom", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    except (AttributeError, OSError):
        return None
    try:
        os.ftruncate(fd, nbytes)
        made = mmap.mmap(fd, nbytes, mmap.MAP_SHARED)
        # What is mapped before stays writable.
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | _FUTURE_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        whole = not flags or populate(ctypes.addressof(ctypes.c_char.from_buffer(made)), nbytes)
    except OSError:
        whole = False
    if whole:
        return fd, made
    os.close(fd)
    return None
