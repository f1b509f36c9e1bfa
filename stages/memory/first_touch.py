"""Memory made ready ahead of its first use, a little at a time.

The first touch of a page has the system find and clear it, which costs more than the copy that
touches it. Whoever lives long has that done by a thread that works a fifth of the time at most, and
less where cores are busy. It asks Linux for the pages (MADV_POPULATE_WRITE, since 5.14), which
changes no byte: so it does not matter what of the memory is in use meanwhile.

The thread's priority is that of any other. One that the system lets wait holds the interpreter's
lock, or the process's map of memory, all the while, and who needs them waits with it.
"""

from __future__ import annotations

import ctypes
import threading
import time

from tierloom.stages.memory.page_lock import LEFT, available

STEP = 256 << 10
"""Bytes of one call: 0.1 ms of small pages, in which no thread of the process can map memory."""
_BATCH = 64 << 20
"""Bytes between two looks at how much memory is left."""
_REST = 4
"""Times as long as a call took until the next: a busy machine is left alone for longer."""
_AGAIN = 30.0
"""Seconds until the next look where too little memory is left."""
_POPULATE_WRITE = 23


class FirstTouch:
    """Begins when it is made, ends when all is touched, and at once when stopped."""

    def __init__(self, address: int, nbytes: int) -> None:
        """`address`, `nbytes`: mapped, of whole pages, until `stop()` has returned."""
        self._address, self._nbytes = address, nbytes
        self.touched = 0
        """Bytes so far."""
        self._stopped = threading.Event()
        self._calling = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="tierloom-touch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nothing is touched from here on. Waits for one call at most."""
        self._stopped.set()
        with self._calling:
            pass

    def _run(self) -> None:
        room, rest = 0, 0.0
        leave = max(LEFT, available(high=True) // 4)  # others start later, engines among them
        while self.touched < self._nbytes and not self._stopped.wait(rest):
            if room < STEP:
                room = min(_BATCH, available(high=True) - leave)
                rest = _AGAIN if room < STEP else 0.0
                continue
            began = time.monotonic()
            if not self._touch(min(STEP, self._nbytes - self.touched)):
                return
            rest, room = _REST * (time.monotonic() - began), room - STEP

    def _touch(self, nbytes: int) -> bool:
        """Whether that worked, and may go on."""
        with self._calling:
            if self._stopped.is_set() or not populate(self._address + self.touched, nbytes):
                return False
            self.touched += nbytes
            return True


def populate(address: int, nbytes: int) -> bool:
    """Have the system find pages for this memory. False: it cannot, or has none to give."""
    return bool(_madvise(address, nbytes, _POPULATE_WRITE) == 0)


_madvise = ctypes.CDLL(None).madvise  # frees the GIL, which `mmap.madvise` does not
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
