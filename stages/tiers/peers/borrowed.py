"""Borrowed: what memory evicted here, put into memory that other engines do not use.

    near: {use: peer, directory: [...], borrow: 8 GiB}      # here
    serve: {listen: ..., tiers: [hot], lend: 8 GiB}         # there

It is found again as anything that an engine keeps. Nobody waits for it: an object goes while few
wait, and while most of the memory for requests is spare; else, and when the other engine is full,
slow or gone, it is dropped, as it would have been.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TypeVar

import anyio

from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.kv.object import Object
from tierloom.stages.memory.arena import Arena
from tierloom.stages.options import masked
from tierloom.stages.tiers.peers.holder import Holder

log = logging.getLogger(__name__)

T = TypeVar("T")

_WAITING = 8
"""Share of the memory for requests that may wait to be sent."""
_FULL, _FAILED = 2.0, 30.0
"""Seconds for which an engine that had no room, or failed, is not asked."""


class Borrowed:
    """On the tier's loop."""

    def __init__(
        self, most: int, limit: float, arena: Arena,
        lenders: Callable[[], Awaitable[Iterable[Holder]]],
    ) -> None:  # fmt: skip
        """`most`: bytes at all others together. `limit`: seconds for one object. `lenders`: who may
        lend, in any order."""
        self._most, self._limit, self._arena, self._lenders = most, limit, arena, lenders
        self._waiting: deque[Object] = deque()
        self._queued = 0
        self._woken = anyio.Event()
        self._placed: OrderedDict[bytes, tuple[Holder, int]] = OrderedDict()
        """By key, oldest first: where it was put, and its bytes. Some may be gone by now."""
        self._left_alone: dict[Holder, float] = {}
        self._closed = False
        self._forgotten = 0
        """Calls of `clear` so far."""
        self.nbytes = 0
        """Of all that was put and not taken away again."""
        self.dropped = 0
        """Objects that nobody took."""

    def offer(self, obj: Object) -> None:
        """Memory gives it up now. Returns at once; keeps its lease, if it is to be sent."""
        nbytes, arena = obj.lease.nbytes, self._arena
        full = self._queued and self._queued + nbytes > arena.working // _WAITING
        few = arena.promises.spare - nbytes < arena.working // 2
        if self._closed or full or few or not arena.promises.try_reserve(nbytes):
            self.dropped += 1
            return
        obj.lease.retain()
        self._queued += nbytes
        self._waiting.append(obj)
        self._woken.set()

    async def clear(self) -> int:
        """Have all of it deleted, also what is being put just now."""
        self._forgotten += 1
        while self._waiting:
            self._let_go(self._waiting.pop())
        placed, self._placed, self.nbytes = self._placed, OrderedDict(), 0
        keys: dict[Holder, list[bytes]] = {}
        for key, (holder, _) in placed.items():
            keys.setdefault(holder, []).append(key)
        gone = [await self._ask(h, partial(h.delete, part)) for h, part in keys.items()]
        return sum(n or 0 for n in gone)

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                while not self._waiting:
                    self._woken = anyio.Event()
                    await self._woken.wait()
                obj = self._waiting.popleft()
                try:
                    self.dropped += not await self._place(obj)
                finally:
                    self._let_go(obj)
        finally:
            self._closed = True
            while self._waiting:
                self._let_go(self._waiting.popleft())

    def _let_go(self, obj: Object) -> None:
        nbytes = obj.lease.nbytes
        obj.lease.release()
        self._queued -= nbytes
        self._arena.promises.unreserve(nbytes)

    async def _place(self, obj: Object) -> bool:
        """Whether somebody has it now."""
        key, nbytes, forgotten = obj.header.key, obj.lease.nbytes, self._forgotten
        if nbytes > self._most or (holder := await self._lender()) is None:
            return False
        while self.nbytes + nbytes > self._most and key not in self._placed:
            oldest, (place, size) = self._placed.popitem(last=False)
            self.nbytes -= size
            await self._ask(place, partial(place.delete, [oldest]))
        before = holder.counts.puts
        lost = await self._ask(holder, partial(holder.put, [obj]))
        if forgotten != self._forgotten:
            await self._ask(holder, partial(holder.delete, [key]))
            return False
        if lost is None:
            self._forget(holder)
            return False
        if lost[0] is not None:
            self._left_alone[holder] = time.monotonic() + _FULL
        elif holder.counts.puts > before:  # else it was there
            self._note(key, holder, nbytes)
        return lost[0] is None

    async def _lender(self) -> Holder | None:
        """The quickest engine that may lend."""
        try:
            now = time.monotonic()
            left_alone = {h: t for h, t in self._left_alone.items() if t > now}
            self._left_alone = left_alone
            found = [h for h in await self._lenders() if h.healthy and h not in left_alone]
        except (ConfigError, TierDown, OSError, TimeoutError):
            found = []
        return min(found, key=lambda holder: holder.rank, default=None)

    async def _ask(self, holder: Holder, work: Callable[[], Awaitable[T]]) -> T | None:
        """What `work` returns; None: it failed, and the engine is left alone. That says nothing of
        what can be read there."""
        try:
            with anyio.fail_after(self._limit):
                return await work()
        except Exception as error:  # whatever it is, the next engine may do better
            log.info("%s does not lend: %s", holder.options.url, masked(repr(error)))
            self._left_alone[holder] = time.monotonic() + _FAILED
            return None

    def _note(self, key: bytes, holder: Holder, nbytes: int) -> None:
        self.nbytes += nbytes - self._placed.pop(key, (holder, 0))[1]
        self._placed[key] = holder, nbytes

    def _forget(self, holder: Holder) -> None:
        """What it had may be gone with it."""
        for key in [k for k, (place, _) in self._placed.items() if place is holder]:
            self.nbytes -= self._placed.pop(key)[1]
