"""Promises: chunks that another engine is to fetch, kept from eviction until it has, or for a time.

A ticket names chunks before they are stored, so that whoever asks early can wait for them. What
comes is held where it lies in memory; its engine blocks are long free.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tierloom.stages.kv.object import LINK, Object
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.index import split

_MOST = 4096
"""Tickets at once; the oldest ends when there are more."""
_LOOK = 1.0
"""Seconds between two looks whether what is being stored is given up."""
_SHARE = 2
"""Tickets hold one part in so many of a tier's capacity; what is beyond may be evicted."""


@dataclass(slots=True)
class Promise:
    """What one ticket names."""

    until: float
    keys: set[bytes] = field(default_factory=set)
    taken: int = 0
    """Workers that have all of it."""
    settled: bool = False
    """What is not there by now will not come."""


@dataclass(slots=True)
class PromisedChunk:
    """A chunk that tickets name."""

    links: bytes
    """Its grain links; the last is its key."""
    tickets: int = 0


@dataclass(slots=True, eq=False)
class ArrivingObject:
    """An object that is being stored, frame by frame. Whoever keeps it holds its lease."""

    object: Object
    _from_start: int = 0
    _beyond: set[int] = field(default_factory=set)

    @property
    def ready(self) -> int:
        """Frames that are there, from the first one on."""
        return len(self.object.header.frames) if self.object.sealed else self._from_start

    def note(self, frames: range) -> None:
        """These are there, whichever came before."""
        self._beyond.update(frames)
        while self._from_start in self._beyond:
            self._beyond.discard(self._from_start)
            self._from_start += 1


class Watcher:
    """Tells a task of another loop that something has come."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def wake(self) -> None:
        """Any thread."""
        with suppress(RuntimeError):  # its loop has closed
            self._loop.call_soon_threadsafe(self._event.set)

    def clear(self) -> None:
        self._event.clear()

    async def wait(self, seconds: float) -> None:
        """Until something has come since `clear`, or `seconds` are over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)


class Promises:
    """Any thread. The locks of tiers' indexes come before the one in here."""

    def __init__(
        self, tiers: Sequence[CircuitBreaker], seconds: float, *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`tiers`: memory that is served. `seconds`: how long a ticket lives after its last chunk
        came."""
        self._tiers, self._seconds, self._clock = tiers, seconds, clock
        self._most = sum(tier.stat().capacity for tier in tiers) // _SHARE
        self._lock = threading.Lock()
        self._tickets: dict[bytes, Promise] = {}
        self._wanted: dict[bytes, PromisedChunk] = {}
        self._pins: dict[bytes, Lease] = {}
        self._arriving: dict[bytes, ArrivingObject] = {}
        self._over: dict[bytes, float] = {}
        """Tickets that were released before they were opened, and until when that is believed."""
        self._watchers: set[Watcher] = set()
        self.pinned = 0
        """Bytes that are held for tickets."""

    def __len__(self) -> int:
        return len(self._tickets)

    def open(self, ticket: bytes, chunks: Sequence[bytes]) -> None:
        """Promise chunks, also such as are yet to come; an open one gets more time and chunks.
        `chunks`: grain links of each."""
        keys = [links[-LINK:] for links in chunks]
        released: list[Lease] = []
        with self._lock:
            now = self._clock()
            if self._over.pop(ticket, 0.0) > now:  # all of it was here: it was fetched at once
                return
            promise = self._tickets.pop(ticket, None) or Promise(0.0)
            promise.until = now + self._seconds
            self._tickets[ticket] = promise
            for key, links in zip(keys, chunks, strict=True):
                if key not in promise.keys:
                    promise.keys.add(key)
                    self._wanted.setdefault(key, PromisedChunk(links)).tickets += 1
            while len(self._tickets) > _MOST:
                self._end(next(iter(self._tickets)), released)
        _release(released)
        for key in keys:
            self._pin(key)
        self._wake()

    def release(self, ticket: bytes) -> None:
        """Its chunks may be evicted from now on; the names still find what is left. Whoever asks
        before it is opened may also release it before: then it is not opened."""
        released: list[Lease] = []
        with self._lock:
            if ticket not in self._tickets:
                self._over[ticket] = self._clock() + self._seconds
                if len(self._over) > _MOST:
                    del self._over[next(iter(self._over))]
            self._end(ticket, released)
        _release(released)
        self._wake()

    def settle(self, ticket: bytes) -> None:
        """What it names is stored, or was lost: nobody need wait any more."""
        with self._lock:
            if (promise := self._tickets.get(ticket)) is not None:
                promise.settled = True
        self._wake()

    def is_settled(self, ticket: bytes) -> bool:
        promise = self._tickets.get(ticket)
        return promise is not None and promise.settled

    def taken(self, ticket: bytes, askers: int) -> None:
        """One of so many workers that ask for it has all that there is: the last one releases
        it."""
        with self._lock:
            promise = self._tickets.get(ticket)
            if promise is not None:
                promise.taken += 1
            last = askers <= (1 if promise is None else promise.taken)
        if last:
            self.release(ticket)

    def clear(self) -> None:
        """End all tickets."""
        released: list[Lease] = []
        with self._lock:
            for ticket in list(self._tickets):
                self._end(ticket, released)
        _release(released)
        self._wake()

    def expire(self) -> float | None:
        """End tickets whose time is over, and let go of what is not stored any more; seconds until
        this is to be called again, None: there is no ticket."""
        released: list[Lease] = []
        with self._lock:
            now = self._clock()
            self._drop_given_up(released)
            for ticket in [t for t, promise in self._tickets.items() if promise.until <= now]:
                self._end(ticket, released)
            left = min((p.until for p in self._tickets.values()), default=None)
        _release(released)
        return None if left is None else min(max(0.0, left - now), _LOOK)

    def note(self, links: bytes) -> None:
        """An object of these grain links came to a tier; called under the lock of its index, too.
        It may have more grains than what was promised."""
        came = [link for link in split(links) if link in self._wanted] if self._wanted else []
        if not came:
            return
        released: list[Lease] = []
        with self._lock:
            self._renew(came)
            whole = [self._arriving.pop(key, None) for key in came]
            released += [arrived.object.lease for arrived in whole if arrived is not None]
        _release(released)
        for key in came:
            self._pin(key)
        self._wake()

    def note_frames(self, obj: Object, frames: range) -> None:
        """Frames of an object that is being stored are there, in its lease."""
        key = obj.header.key
        if key not in self._wanted:
            return
        released: list[Lease] = []
        with self._lock:
            if key not in self._wanted:
                return
            self._renew([key])
            self._drop_given_up(released)
            known = self._arriving.get(key)
            if known is None or known.object is not obj:
                if known is not None:
                    released.append(known.object.lease)
                obj.lease.retain()
                known = self._arriving[key] = ArrivingObject(obj)
            known.note(frames)
        _release(released)
        self._wake()

    def arriving(self, key: bytes) -> ArrivingObject | None:
        """An object that is being stored; its lease is retained for the caller, who releases it."""
        with self._lock:
            found = self._arriving.get(key)
            if found is not None:
                found.object.lease.retain()
            return found

    def kept_as(self, key: bytes) -> bytes:
        """The key of an object in memory that begins with a chunk that was promised; empty: there
        is none."""
        wanted = self._wanted.get(key)
        if wanted is None:
            return b""
        for tier in self._tiers:
            found = tier.find(wanted.links)
            if found is not None and found.grains * LINK == len(wanted.links):
                return found.key
        return b""

    def expects(self, ticket: bytes, key: bytes, *, later: bool) -> bool:
        """What is not there may come yet. `later`: so may the ticket."""
        with self._lock:
            promise = self._tickets.get(ticket)
            return later if promise is None else key in promise.keys and not promise.settled

    @contextmanager
    def watcher(self) -> Iterator[Watcher]:
        """Woken whenever a chunk comes that was promised, and when a ticket opens or ends."""
        made = Watcher()
        with self._lock:
            self._watchers.add(made)
        try:
            yield made
        finally:
            with self._lock:
                self._watchers.discard(made)

    def _renew(self, keys: Sequence[bytes]) -> None:
        """Tickets that name one of these get their whole time. Under the lock."""
        until = self._clock() + self._seconds
        for promise in self._tickets.values():
            if not promise.keys.isdisjoint(keys):
                promise.until = until

    def _drop_given_up(self, released: list[Lease]) -> None:
        """What nobody else holds any more was not stored. Under the lock."""
        left = [key for key, a in self._arriving.items() if a.object.lease.refs == 1]
        released += [self._arriving.pop(key).object.lease for key in left]

    def _wake(self) -> None:
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.wake()

    def _pin(self, key: bytes) -> None:
        """Hold an object, if it is in memory and there is room for one more."""
        if key in self._pins or self.pinned >= self._most:
            return
        kept = self.kept_as(key)
        held = next((o for t in self._tiers if kept and (o := t.hold(kept)) is not None), None)
        if held is None:
            return
        lease = held.lease
        with self._lock:
            fits = self.pinned + lease.nbytes <= self._most
            if fits and key in self._wanted and key not in self._pins:
                self._pins[key] = lease
                self.pinned += lease.nbytes
                return
        lease.release()

    def _end(self, ticket: bytes, released: list[Lease]) -> None:
        """Under the lock; the leases are released without it."""
        promise = self._tickets.pop(ticket, None)
        for key in promise.keys if promise is not None else ():
            self._wanted[key].tickets -= 1
            if not self._wanted[key].tickets:
                del self._wanted[key]
                if (arriving := self._arriving.pop(key, None)) is not None:
                    released.append(arriving.object.lease)
                if (lease := self._pins.pop(key, None)) is not None:
                    self.pinned -= lease.nbytes
                    released.append(lease)


def _release(leases: Sequence[Lease]) -> None:
    for lease in leases:
        lease.release()
