"""MemoryPromises: how much of the arena's working memory each request may lease.

Whoever means to lease asks first, for all it will need, so that no two requests each hold half of
what both wait for. Promises are made first come, first served. Stores never hold all of it: what
is left is for loads, which somebody waits for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from itertools import count

from tierloom.stages.errors import ArenaFull

_STORES = 0.75
"""Share that stores may hold together."""


@dataclass(slots=True, eq=False)
class _Waiter:
    turn: int
    nbytes: int
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    gone: bool = False


class MemoryPromises:
    """All calls are made on one loop."""

    def __init__(self, total: int) -> None:
        """`total`: bytes that may be promised at once."""
        self.total = total
        self._held = self._stored = 0
        self._turns = count()
        self._loads: deque[_Waiter] = deque()
        self._stores: deque[_Waiter] = deque()

    @property
    def spare(self) -> int:
        """Bytes that nobody was promised."""
        return self.total - self._held

    async def reserve(self, nbytes: int, *, storing: bool = False) -> None:
        """Wait for a promise. Bound it with a cancel scope. Raises ArenaFull when it never could be
        made."""
        if nbytes > self.total:
            raise ArenaFull(f"{nbytes} bytes never fit in {self.total}: raise budget.arena")
        mine = _Waiter(next(self._turns), nbytes)
        (self._stores if storing else self._loads).append(mine)
        self._grant()
        if mine.granted.is_set():
            return
        try:
            await mine.granted.wait()
        except BaseException:
            if mine.granted.is_set():
                self.unreserve(nbytes, storing=storing)
            else:
                mine.gone = True
                self._grant()  # to those after it
            raise

    def try_reserve(self, nbytes: int) -> bool:
        """A promise for one who holds another already, and so must not wait: at once, or none."""
        if nbytes > self.spare:
            return False
        self._held += nbytes
        return True

    def try_store(self, nbytes: int) -> bool:
        """`reserve` for a store whose turn it is already; False: it has to wait."""
        turn = not _first(self._loads) and not _first(self._stores)
        if not turn or not self._may_store(nbytes) or not self.try_reserve(nbytes):
            return False
        self._stored += nbytes
        return True

    def unreserve(self, nbytes: int, *, storing: bool = False) -> None:
        """Give a promise back."""
        self._held -= nbytes
        self._stored -= nbytes if storing else 0
        self._grant()

    def _grant(self) -> None:
        """Make promises in turn. A store that has to wait for other stores holds up no load."""
        while True:
            load, store = _first(self._loads), _first(self._stores)
            if store is not None and not self._may_store(store.nbytes):
                store = None
            storing = store is not None and (load is None or store.turn < load.turn)
            waiter = store if storing else load
            if waiter is None or waiter.nbytes > self.spare:
                return
            (self._stores if storing else self._loads).popleft()
            self._held += waiter.nbytes
            self._stored += waiter.nbytes if storing else 0
            waiter.granted.set()

    def _may_store(self, nbytes: int) -> bool:
        """One alone may ask for more than the stores' share."""
        return not self._stored or self._stored + nbytes <= self.total * _STORES


def _first(waiters: deque[_Waiter]) -> _Waiter | None:
    while waiters and waiters[0].gone:
        waiters.popleft()
    return waiters[0] if waiters else None
