"""OwnTiers: what a pipeline keeps, for other engines to read, while its own requests go first.

What lies in memory is sent from where it lies. What lies on a disk is read on the pipeline's loop,
a little at a time and into memory that no request was promised; what does not fit is a miss.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

import anyio
import anyio.lowlevel

from tierloom.pipeline.handoff.handoff import Handoff
from tierloom.pipeline.handoff.promises import Promises
from tierloom.pipeline.run.loop_thread import Portal, awaited
from tierloom.pipeline.serve.object_store import MemoryReservation
from tierloom.stages.errors import Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.memory.arena import Arena, Lease
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import Read, TierStat
from tierloom.stages.tiers.memory.lent import Lent
from tierloom.stages.tiers.server.ranks import RankShare

_COLD = 2
"""Objects that are read from disks at once."""
_SLICE = 64
"""Keys looked up between two turns of the loop."""
_WHOLE = 1 << 30


class OwnTiers:
    """Read on the listener's loop, by clients of the pipeline's own namespace. That neither counts
    as a use, nor deletes anything. What they put goes into memory that is lent, if any."""

    kept_in_memory = 0
    """Nothing of it is lent: an engine may need it at any time."""

    def __init__(
        self, tiers: Sequence[CircuitBreaker], arena: Arena, namespace: bytes, portal: Portal,
        lent: CircuitBreaker | None = None,
    ) -> None:  # fmt: skip
        """`tiers`: with an index in this process, best first. `portal`: runs the loop they are
        on. `lent`: a `Lent` in which others may put; None: nowhere."""
        self._tiers = [*tiers, lent] if lent is not None else tiers
        self._lent = lent.tier if lent is not None and isinstance(lent.tier, Lent) else None
        self.writable = self._lent is not None
        self.namespace, self._portal = namespace, portal
        self.arena, self.largest = arena, arena.total
        self._most = max(arena.total - arena.working, arena.working) // 4
        self.handoff: Handoff | None = None
        """What of it others are to fetch, and what is fetched from others."""
        self.lock = threading.Lock()
        self.held = self.promised = self.given = 0
        """Bytes that clients hold; of these in memory for requests; objects given so far."""
        self._cold = anyio.Semaphore(_COLD)

    @property
    def promises(self) -> Promises | None:
        return self.handoff.promises if self.handoff is not None else None

    @property
    def takes_offers(self) -> bool:
        """Others may say what this one is to fetch from them."""
        return self.handoff is not None and self.handoff.takes_offers

    @property
    def ranks(self) -> list[RankShare]:
        """Who of this engine's workers serves what."""
        return self.handoff.ranks if self.handoff is not None else []

    def reservation(self) -> MemoryReservation:
        return HeldForClient(self)

    async def exists(self, space: bytes, keys: Sequence[bytes]) -> list[bool]:
        found = [space == self.namespace] * len(keys)
        for i, key in enumerate(keys):
            found[i] = found[i] and any(self._nbytes(tier, key) for tier in self._tiers)
            if i % _SLICE == _SLICE - 1:
                await anyio.lowlevel.checkpoint()
        return found

    async def make_room(
        self, space: bytes, reservation: MemoryReservation, keys: Iterable[bytes]
    ) -> bool:
        """`read` sees to that."""
        return True

    async def read(
        self, space: bytes, reservation: MemoryReservation, key: bytes, *, room: bool
    ) -> Object | Lost:
        """The whole object, whose lease the reservation releases."""
        lost = Lost.ABSENT
        for tier in self._tiers if space == self.namespace else ():
            nbytes = self._nbytes(tier, key)
            if not nbytes or not tier.available:
                continue
            if self.held and self.held + nbytes > self._most:
                return Lost.NO_ROOM
            got: Object | Lost | None
            if tier.in_arena:
                got = tier.hold(key)
                if got is not None:
                    reservation.take(got.lease)
            else:
                async with self._cold:
                    begun = self._portal.begin(self._read, tier, reservation, key, nbytes)
                    got = await awaited(begun)
            if isinstance(got, Object):
                self.given += 1
                return got
            lost = got or lost
        return lost

    async def put(self, space: bytes, obj: Object) -> Lost | None:
        """Keep what another engine has no room for, until there is none here."""
        if self._lent is None or space != self.namespace:
            return Lost.NO_ROOM
        return (await self._lent.put([obj]))[0]

    async def order_for_eviction(self, space: bytes, keys: Iterable[bytes]) -> None:
        return

    async def delete(self, space: bytes, keys: Iterable[bytes]) -> int:
        """Of what others have put, and nothing else."""
        if self._lent is None or space != self.namespace:
            return 0
        return await self._lent.delete(list(keys))

    async def clear(self, space: bytes) -> int:
        return 0

    def stat(self, space: bytes) -> TierStat:
        stats = [t.stat() for t in self._tiers] if space == self.namespace else []
        return TierStat(*(sum(s[i] for s in stats) for i in range(3)))

    @property
    def lent_bytes(self) -> int:
        return self._lent.stat().nbytes if self._lent is not None else 0

    @property
    def evicted(self) -> int:
        return sum(tier.counts.evicted for tier in self._tiers)

    def let_go(self, leases: Iterable[Lease], promised: int) -> None:
        """Release leases, and then what was promised for them; any thread."""
        for lease in leases:
            lease.release()
        if promised:
            self._portal.post(self._unpromise, promised)

    def _nbytes(self, tier: CircuitBreaker, key: bytes) -> int:
        """Of a whole object; 0: it is not there, or cannot be read."""
        found = tier.find(key)
        there = found is not None and found.key == key and key not in tier.unread
        return found.nbytes if found is not None and there else 0

    async def _read(
        self, tier: CircuitBreaker, reservation: MemoryReservation, key: bytes, nbytes: int
    ) -> Object | Lost | None:
        """On the pipeline's loop, where a promise is never waited for."""
        assert isinstance(reservation, HeldForClient)
        if not self._try_promise(nbytes):
            return Lost.NO_ROOM
        read = Read(key, _WHOLE)
        try:
            await tier.read([read])
        finally:
            if read.object is not None:
                reservation.take(read.object.lease, nbytes)
            else:
                self._unpromise(nbytes)
        return read.object or read.lost

    def begin_promise(self, reservation: HeldForClient, nbytes: int) -> Future[bool]:
        """Room for what others put, in memory that is idle; the answer comes at once."""
        return self._portal.begin(self._promise, reservation, nbytes)

    async def _promise(self, reservation: HeldForClient, nbytes: int) -> bool:
        if self._lent is None or not self._try_promise(nbytes):
            return False
        if not self._lent.make_way(nbytes):
            self._unpromise(nbytes)
            return False
        reservation.promised(nbytes)
        return True

    def _try_promise(self, nbytes: int) -> bool:
        """Clients together get a quarter of what requests have, of what nobody was promised."""
        mine = self.arena.working // 4 - self.promised
        if nbytes > mine or not self.arena.promises.try_reserve(nbytes):
            return False
        self.promised += nbytes
        return True

    def _unpromise(self, nbytes: int) -> None:
        self.promised -= nbytes
        self.arena.promises.unreserve(nbytes)


class HeldForClient(MemoryReservation):
    """What one answer holds. A disk may hand a lease over when the client has gone already."""

    def __init__(self, store: OwnTiers) -> None:
        super().__init__(store.arena)
        self._store, self._closed = store, False

    async def promise(self, nbytes: int) -> bool:
        """Never waits."""
        if not nbytes:
            return True
        return bool(await awaited(self._store.begin_promise(self, nbytes)))

    def promised(self, nbytes: int) -> None:
        """Any thread; given back with the rest."""
        with self._store.lock:
            if not self._closed:
                self._promised += nbytes
                return
        self._store.let_go((), nbytes)

    def lease(self, nbytes: int) -> Lease:
        """Nothing is evicted for it but what others put."""
        return self._arena.lease(nbytes, evict=False)

    def take(self, lease: Lease, promised: int = 0) -> None:
        """Any thread. `promised`: bytes of the arena that are given back with it."""
        with self._store.lock:
            if not self._closed:
                self._leases.append(lease)
                self._promised += promised
                self._store.held += lease.nbytes
                return
        self._store.let_go([lease], promised)

    def close(self) -> None:
        with self._store.lock:
            self._closed = True
            leases, promised = self._leases, self._promised
            self._leases, self._promised = [], 0
            self._store.held -= sum(lease.nbytes for lease in leases)
        self._store.let_go(leases, promised)
