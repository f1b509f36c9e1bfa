"""s3: one object per chunk in a bucket: S3 and what speaks like it, Google Cloud Storage, Azure.

    cold: {use: s3, url: s3://bucket/prefix, endpoint: "http://minio:9000", timeout: 5 s}

There is no index: the bucket says whether an object exists, its lifecycle rules how long. An object
is put whole or not at all, and never over another. Reads are ranged and parallel; each part is
copied once, from the client's buffer into the lease that it is served from. Cancelling a call ends
its requests, so nothing here waits longer than the tier's `timeout`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import anyio
import numpy as np

from tierloom.stages.errors import Damaged, Lost, TierDown
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.buckets.bucket import Bucket, S3Options
from tierloom.stages.tiers.contract.concurrently import map_concurrently, search_prefix
from tierloom.stages.tiers.contract.object_reader import ObjectReader, ReadingTier
from tierloom.stages.tiers.contract.tier import Read, SharedTier, TierContext, require_sealed

log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds that closing waits for transfers whose callers were cancelled
_WIDE = 16  # requests of one call at once that carry no data


class S3(ReadingTier, SharedTier):
    """Whole chunks only: inner links are found in local tiers. For asyncio."""

    Options = S3Options
    one_by_one = True

    def __init__(self, options: S3Options, ctx: TierContext) -> None:
        super().__init__(ctx)
        self.options = options
        self._bucket = Bucket(options, ctx.namespace.hex()[:32] or "any")
        self._parts = anyio.Semaphore(options.requests)

    async def open(self) -> None:
        await self._bucket.open()

    async def close(self) -> None:
        if not await self._bucket.transfers.idle(_PATIENCE):  # the arena stays, therefore
            log.error(
                "transfers still in progress", extra={"transfers": len(self._bucket.transfers)}
            )

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        found = await map_concurrently(self._bucket.size, [object_name(key) for key in keys], _WIDE)
        return [size is not None for size in found]  # an empty one too: the first reader deletes it

    async def prefix_length(self, keys: Sequence[bytes]) -> int:
        return await search_prefix(self.exists, keys)

    async def read(self, reads: Sequence[Read]) -> None:
        await map_concurrently(self._read, reads, self.options.depth)

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        return await map_concurrently(self._put, objects, self.options.depth)

    async def delete(self, keys: Sequence[bytes]) -> int:
        return sum(await map_concurrently(self._drop, [object_name(key) for key in keys], _WIDE))

    async def clear(self) -> int:
        return sum(await map_concurrently(self._drop, await self._bucket.list(), _WIDE))

    async def _read(self, read: Read) -> None:
        held = read.object
        with ObjectReader(read, self.ctx.arena, self.counts) as reader:
            if held is None:
                header, begin = await self._first(reader)
            elif read.upto > held.loaded and not held.sealed:
                header, begin = held.header, held.header.boundaries[held.loaded]
            else:
                return
            lease, boundaries = reader.lease(0), header.boundaries
            end = max(begin, boundaries[min(read.upto, len(header.frames))])
            part = partial(self._part, object_name(read.key), lease, end)
            await map_concurrently(part, range(begin, end, self.options.part), self.options.ranges)
            reader.deliver(header, max(n for n, stop in enumerate(boundaries) if stop <= end))
        if reader.proof is not None:
            with suppress(TierDown):  # readable, but perhaps not ours to delete
                await self.expel(read.key, reader.proof, reader.seen)

    async def _head(self, key: bytes, nbytes: int) -> bytes:
        try:
            view, _ = await self._bucket.get(object_name(key), max(1, nbytes))
        except Damaged:  # it is empty
            return b""
        return bytes(view)

    async def _first(self, reader: ObjectReader) -> tuple[Header, int]:
        """Load the first part of an object into a new lease; its header, and how many bytes these
        are."""
        key = reader.read.key
        async with self._parts:
            view, size = await self._bucket.get(object_name(key), PAGE + self.options.part)
            reader.seen = bytes(view[:PAGE])
            header = self._header(view, key, size)
            lease = reader.lease(size)
            await self.ctx.pool(_copy, lease, 0, view, leases=(lease,))
            return header, len(view)

    def _header(self, view: memoryview, key: bytes, size: int) -> Header:
        """What `size` bytes that begin like this say of themselves. Raises BadObject."""
        header = Header.unpack(view, key=key, namespace=self.ctx.namespace)
        if header.nbytes != size:
            raise Damaged(f"{size} bytes are stored, but the object has {header.nbytes}")
        return header

    async def _part(self, name: str, lease: Lease, end: int, start: int) -> None:
        stop = min(end, start + self.options.part)
        async with self._parts:
            view = await self._bucket.get_range(name, start, stop)
            await self.ctx.pool(_copy, lease, start, view, leases=(lease,))

    async def _put(self, obj: Object) -> Lost | None:
        require_sealed(obj)
        nbytes = obj.header.nbytes
        if await self._bucket.put(object_name(obj.header.key), obj.lease, nbytes):
            self.counts.puts += 1
            self.counts.bytes_in += nbytes
            self._holdings.add(1, nbytes)
        return None

    async def _drop(self, name: str) -> bool:
        size = await self._bucket.size(name)
        if size is None:
            return False
        await self._bucket.delete(name)
        self._holdings.add(-1, -size)
        return True


def object_name(key: bytes) -> str:
    """What an object is called in its folder."""
    return f"{key.hex()}.tlm"


def _copy(lease: Lease, start: int, view: memoryview) -> None:
    """In a thread of the pool, without the GIL."""
    there = np.frombuffer(lease.view, np.uint8)
    there[start : start + len(view)] = np.frombuffer(view, np.uint8)
