"""An arena that detects who touches memory after its release."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from tierloom.stages.memory.arena import Arena, Lease

FREED, FRESH = 0xDB, 0xCD
_QUARANTINE = 32 << 20


class PoisonArena(Arena):
    """What is released is filled with poison and leased again as late as can be; then, and when the
    arena is closed, the poison must be as it was, or somebody wrote who held no reference. Who only
    reads late gets poison, which no checksum fits.

    As large as an `Arena`, besides `quarantine`: a late write into what is leased again already
    would not be seen here.
    """

    def __init__(
        self, working: int, kept: int = 0, *, quarantine: int = _QUARANTINE, **options: Any
    ) -> None:
        self._freed: deque[tuple[int, int]] = deque()
        self._waiting = 0
        """Bytes released and not to be leased yet."""
        self._most = quarantine
        self.beyond = 0
        """Most bytes that were in flight at once, beyond what was promised."""
        self.late: list[str] = []
        """What was written late, and where."""
        super().__init__(working, kept + quarantine, **options)

    @property
    def used(self) -> int:
        return super().used - self._waiting

    @property
    def idle(self) -> int:
        return super().idle - self._most

    def lease(self, nbytes: int, *, evict: bool = True) -> Lease:
        lease = super().lease(nbytes, evict=evict)
        self._fill(lease.offset, lease.nbytes, FRESH)
        promised = self.promises.total - self.promises.spare
        self.beyond = max(self.beyond, self.flight - promised)
        return lease

    def check(self) -> None:
        """Raises AssertionError when anything was written late so far."""
        with self.lock:
            for offset, nbytes in self._freed:
                self._examine(offset, nbytes)
        assert not self.late, f"written after its last release: {'; '.join(self.late)}"

    def close(self) -> None:
        if not self.leases:
            self.check()
            self._freed.clear()
        super().close()

    def _take(self, nbytes: int) -> int | None:
        while (offset := super()._take(nbytes)) is None and self._freed:
            self._let_go()
        return offset

    def _give(self, offset: int, nbytes: int) -> None:
        self._fill(offset, nbytes, FREED)
        self._freed.append((offset, nbytes))
        self._waiting += nbytes
        while self._waiting > self._most:
            self._let_go()

    def _let_go(self) -> None:
        """The oldest may be leased again."""
        offset, nbytes = self._freed.popleft()
        self._examine(offset, nbytes)
        self._waiting -= nbytes
        super()._give(offset, nbytes)

    def _fill(self, offset: int, nbytes: int, byte: int) -> None:
        np.frombuffer(self.view, np.uint8)[offset : offset + nbytes] = byte

    def _examine(self, offset: int, nbytes: int) -> None:
        memory = np.frombuffer(self.view, np.uint8)[offset : offset + nbytes]
        wrong = np.flatnonzero(memory != FREED)
        if len(wrong):
            self.late.append(f"{len(wrong)} bytes at {wrong[0]} of {nbytes} that lay at {offset}")
            memory[:] = FREED
