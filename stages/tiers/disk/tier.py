"""disk: whole objects in preallocated segment files, with an index in memory and a log of it.

    warm: {use: disk, path: /data/kv, capacity: 1 TiB}

`store.py` does the work in threads of the pool. An object is read into the lease that it is served
from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tierloom.stages.errors import Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.options import Size
from tierloom.stages.tiers.contract.concurrently import map_concurrently
from tierloom.stages.tiers.contract.index import IndexOptions
from tierloom.stages.tiers.contract.indexed import IndexedTier
from tierloom.stages.tiers.contract.object_reader import ObjectReader
from tierloom.stages.tiers.contract.tier import Read, TierContext, require_sealed
from tierloom.stages.tiers.disk.direct_io import SYSTEM, FileIO
from tierloom.stages.tiers.disk.index_log import Extent
from tierloom.stages.tiers.disk.steady_clock import steady_time
from tierloom.stages.tiers.disk.store import SegmentStore


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskOptions(IndexOptions):
    """Options of a disk tier. `capacity` also bounds the segment files."""

    path: str
    """A folder for this process alone; `~` is the home folder. If another process uses one of
    ~/.cache/tierloom*, the next is taken: NAME-2, and so on."""
    segment: Size = 1 << 30
    """Bytes of a segment file; a folder keeps the size that it was created with."""
    direct: bool | Literal["auto"] = "auto"
    """Bypass the page cache (O_DIRECT): true, false, or auto: if the file system supports it."""
    keep_free: Size = 1 << 30
    """Bytes of the file system to leave free."""
    depth: int = 4
    """Most objects of one call that are read or written at once."""

    def __post_init__(self) -> None:
        super(DiskOptions, self).__post_init__()
        if not self.path:
            raise ValueError("path is empty")
        if min(self.capacity, self.segment) < PAGE:
            raise ValueError(f"capacity and segment must be at least {PAGE} bytes")
        if self.direct not in (True, False, "auto"):
            raise ValueError(f"direct is {self.direct!r}; known: true, false, auto")
        if self.keep_free < 0:
            raise ValueError("keep_free must not be negative")
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")


class Disk(IndexedTier[Extent]):
    """One process per folder; everything survives a restart except the order of use."""

    Options = DiskOptions

    def __init__(
        self, options: DiskOptions, ctx: TierContext, *, clock: Callable[[], float] = steady_time,
        file_io: FileIO = SYSTEM,
    ) -> None:  # fmt: skip
        super().__init__(ctx)
        self.options = options
        self._store = SegmentStore(
            options.path,
            options.capacity // PAGE * PAGE,
            segment=options.segment // PAGE * PAGE,
            policy=options.evict,
            ttl=options.ttl,
            direct=options.direct,
            keep_free=options.keep_free,
            namespace=ctx.namespace,
            counts=self.counts,
            watch=ctx.watch,
            clock=clock,
            file_io=file_io,
        )
        self._index, self._capacity = self._store.index, self._store.capacity

    async def open(self) -> None:
        await self.ctx.pool(self._store.open, leases=())

    async def close(self) -> None:
        await self.ctx.pool(self._store.close, leases=())

    async def read(self, reads: Sequence[Read]) -> None:
        await map_concurrently(self._read, reads, self.options.depth)

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        tail_first = await map_concurrently(self._put, objects[::-1], self.options.depth)
        return tail_first[::-1]

    async def delete(self, keys: Sequence[bytes]) -> int:
        return int(await self.ctx.pool(self._store.delete, list(keys), leases=()))

    async def clear(self) -> int:
        return int(await self.ctx.pool(self._store.clear, leases=()))

    def pin(self, keys: Sequence[bytes], *, pinned: bool = True) -> int:
        return self._store.pin(keys, pinned=pinned)

    async def _read(self, read: Read) -> None:
        entry, held = self._index.get(read.key), read.object
        with ObjectReader(read, self.ctx.arena, self.counts) as reader:
            # Between two reads of one object it may have been evicted, and even been put again,
            # with other bytes if it is encrypted.
            if entry is None or (held is not None and held.source is not entry):
                reader.miss()
                return
            boundaries = entry.place.boundaries
            upto = min(read.upto, len(boundaries) - 1)
            if held is not None and upto <= held.loaded:
                return
            begin = boundaries[held.loaded] if held is not None else 0
            lease = reader.lease(entry.nbytes)
            args = entry, lease, begin, boundaries[upto]
            header = await self.ctx.pool(self._store.load, *args, leases=(lease,))
            reader.deliver(header, upto, source=entry)

    async def _put(self, obj: Object) -> Lost | None:
        require_sealed(obj)
        if self._index.get(obj.header.key) is not None:
            return None
        lost: Lost | None = await self.ctx.pool(self._store.save, obj, leases=(obj.lease,))
        if lost is None:
            self.counts.puts += 1
            self.counts.bytes_in += obj.header.nbytes
        else:
            self.counts.refused += 1
        return lost
