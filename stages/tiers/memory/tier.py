"""memory: objects stay where they were gathered, read or received: in the arena.

    hot: {use: memory, capacity: 64 GiB, evict: s3-fifo}

Nothing is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anyio.lowlevel import checkpoint

from tierloom.stages.errors import Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.tiers.contract.index import Entry, Index, IndexOptions
from tierloom.stages.tiers.contract.indexed import IndexedTier
from tierloom.stages.tiers.contract.tier import Read, TierContext, require_sealed

_TURN = 8  # changes between two turns of the loop: some 10 us each


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryOptions(IndexOptions):
    """Options of a memory tier: the arena grows by `capacity`."""


class Memory(IndexedTier[Object]):
    """Keeps leases. Objects that a reader holds are not evicted: that would free no memory."""

    Options = MemoryOptions
    in_arena = True

    def __init__(
        self,
        options: MemoryOptions,
        ctx: TierContext,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(ctx)
        self.options = options
        self._capacity = options.capacity
        self._index = Index(
            options.evict,
            options.capacity,
            ttl=options.ttl,
            clock=clock,
            in_use=lambda kept: kept.lease.refs > kept.lease.kept,
            watch=ctx.watch,
        )

    async def open(self) -> None:
        self.ctx.arena.reclaim.append(self._reclaim)

    async def close(self) -> None:
        if self._reclaim in self.ctx.arena.reclaim:
            self.ctx.arena.reclaim.remove(self._reclaim)
        await self.clear()

    async def read(self, reads: Sequence[Read]) -> None:
        self._expire()
        for read in reads:
            if read.object is not None:  # came whole the first time
                continue
            read.object = self.hold(read.key)
            if read.object is None:
                read.lost = Lost.ABSENT

    def hold(self, key: bytes) -> Object | None:
        with self._index.lock:  # between finding and holding it, it must not be evicted
            entry = self._index.get(key)
            if entry is not None:
                entry.place.lease.retain()
        if entry is None:
            self.counts.misses += 1
            return None
        header = entry.place.header
        self.counts.hits += 1
        self.counts.bytes_out += header.nbytes
        return Object(header, entry.place.lease, loaded=len(header.frames), sealed=True)

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        self._expire()
        lost = []
        for count, obj in enumerate(reversed(objects), 1):  # so that the prompt's head goes last
            lost.append(self._keep(obj))
            if count % _TURN == 0:
                await checkpoint()
        return lost[::-1]

    async def delete(self, keys: Sequence[bytes]) -> int:
        return await self._drop(
            [entry for key in keys if (entry := self._index.get(key)) is not None]
        )

    async def clear(self) -> int:
        return await self._drop(list(self._index))

    async def _drop(self, entries: list[Entry[Object]]) -> int:
        dropped = 0
        for count, entry in enumerate(entries, 1):
            dropped += self._release(entry)
            if count % _TURN == 0:
                await checkpoint()
        return dropped

    def _keep(self, obj: Object) -> Lost | None:
        require_sealed(obj)
        key, size = obj.header.key, obj.lease.nbytes
        with self._index.lock:
            if key in self._index:
                return None
            if size > self.options.capacity or not self._make_room(key, size):
                self.counts.refused += 1
                return Lost.NO_ROOM
            self.ctx.arena.keep(obj.lease)
            kept = Object(obj.header, obj.lease, loaded=obj.loaded, sealed=True)
            entry = Entry(key, obj.header.links, size, kept, self._index.expiry())
            self._index.add(entry, obj.header.text)
        self.counts.puts += 1
        self.counts.bytes_in += size
        return None

    def _make_room(self, key: bytes, size: int) -> bool:
        self._index.expect(key, size)
        while self._index.nbytes + size > self.options.capacity:
            if not self._evict(key):
                return False
        return True

    def _evict(self, incoming: bytes = b"") -> bool:
        entry = self._index.evict(incoming)
        if entry is None:
            return False
        for take in self.ctx.given_up or () if incoming else ():
            take(entry.place)
        self.ctx.arena.unkeep(entry.place.lease)
        self.counts.evicted += 1
        return True

    def _reclaim(self) -> bool:
        """Evict one object, as the arena has no hole long enough. From any thread."""
        return self._evict()

    def _expire(self) -> None:
        for entry in self._index.expired():
            self._release(entry)

    def _release(self, entry: Entry[Object]) -> bool:
        if not self._index.remove(entry):
            return False
        self.ctx.arena.unkeep(entry.place.lease)
        return True
