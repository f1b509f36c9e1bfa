"""A tier over any key-value store: a subclass supplies five coroutines.

For stores whose client puts and gets whole values. Objects are copied on the way in and out, in
threads, so a lease never reaches foreign code: a subclass owns what it is given. A tier that must
not copy subclasses `Tier` itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np

from tierloom.stages.errors import Damaged, Lost
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.contract.concurrently import map_concurrently, search_prefix
from tierloom.stages.tiers.contract.object_reader import ObjectReader, ReadingTier
from tierloom.stages.tiers.contract.tier import Read, SharedTier, Tier, TierContext, require_sealed

Bytes: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobsOptions:
    """Options of a tier that a URL describes."""

    url: str
    """URL of the store."""


class Blobs(ReadingTier, SharedTier):
    """Names are text: this pipeline's namespace, a slash, the key. A value is a whole object."""

    Options: Any = BlobsOptions
    renamed: ClassVar[Mapping[str, str]] = {
        **Tier.renamed,
        "fetch": "get_value",
        "store": "put_value",
        "remove": "delete_value",
    }
    one_by_one = True
    width: int = 8
    """Most objects of one call in progress at once."""

    def __init__(self, options: Any, ctx: TierContext) -> None:
        super().__init__(ctx)
        self.options = options
        self._prefix = f"{ctx.namespace.hex()[:32] or 'any'}/"
        self._storing: set[str] = set()

    @abstractmethod
    async def size(self, name: str) -> int:
        """Bytes stored under a name; 0: none."""

    @abstractmethod
    async def get_value(self, name: str) -> Bytes | None:
        """The value under a name; None if there is none."""

    @abstractmethod
    async def put_value(self, name: str, data: bytearray) -> bool:
        """Store a value, all or nothing, even if cancelled. False: no room."""

    @abstractmethod
    async def delete_value(self, name: str) -> None:
        """Delete a name, if it exists."""

    @abstractmethod
    async def names(self, prefix: str) -> Iterable[str]:
        """All stored names with this prefix."""

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return [
            size > 0 for size in await map_concurrently(self.size, self._named(keys), self.width)
        ]

    async def prefix_length(self, keys: Sequence[bytes]) -> int:
        return await search_prefix(self.exists, keys)

    async def read(self, reads: Sequence[Read]) -> None:
        fresh = [read for read in reads if read.object is None]  # others came whole the first time
        await map_concurrently(self._read, fresh, self.width)

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        return await map_concurrently(self._put, objects, self.width)

    async def delete(self, keys: Sequence[bytes]) -> int:
        return sum(await map_concurrently(self._drop, self._named(keys), self.width))

    async def clear(self) -> int:
        return sum(
            await map_concurrently(self._drop, list(await self.names(self._prefix)), self.width)
        )

    def _named(self, keys: Sequence[bytes]) -> list[str]:
        return [self._prefix + key.hex() for key in keys]

    async def _read(self, read: Read) -> None:
        (name,) = self._named([read.key])
        data = await self.get_value(name)
        with ObjectReader(read, self.ctx.arena, self.counts) as reader:
            if data is None:
                reader.miss()
                return
            reader.seen = bytes(data[:PAGE])
            header = self._header(read.key, memoryview(data))
            lease = reader.lease(len(data))
            await self.ctx.pool(_fill, lease, data, leases=(lease,))
            reader.deliver(header, len(header.frames))
        if reader.proof is not None:
            await self.expel(read.key, reader.proof, reader.seen)

    async def _head(self, key: bytes, nbytes: int) -> bytes:
        data = await self.get_value(*self._named([key]))
        if data is None:
            raise FileNotFoundError(key.hex())
        return bytes(data[:nbytes])

    def _header(self, key: bytes, data: memoryview) -> Header:
        """Raises BadObject if these bytes are not the expected object."""
        header = Header.unpack(data, key=key, namespace=self.ctx.namespace)
        if header.nbytes != data.nbytes:
            raise Damaged(f"{data.nbytes} bytes are stored, but the object has {header.nbytes}")
        return header

    async def _put(self, obj: Object) -> Lost | None:
        require_sealed(obj)
        (name,) = self._named([obj.header.key])
        if name in self._storing or await self.size(name):
            return None
        self._storing.add(name)
        try:
            nbytes, lease = obj.header.nbytes, obj.lease
            data: bytearray = await self.ctx.pool(_copy, lease, nbytes, leases=(lease,))
            kept = await self.put_value(name, data)
        finally:
            self._storing.discard(name)
        if not kept:
            self.counts.refused += 1
            return Lost.NO_ROOM
        self._holdings.add(1, obj.header.nbytes)
        self.counts.puts += 1
        self.counts.bytes_in += obj.header.nbytes
        return None

    async def _drop(self, name: str) -> int:
        nbytes = await self.size(name)
        await self.delete_value(name)  # also one that is empty
        if nbytes:
            self._holdings.add(-1, -nbytes)
        return int(nbytes > 0)


def _copy(lease: Lease, nbytes: int) -> bytearray:
    """In a thread; NumPy's copies free the GIL."""
    data = bytearray(nbytes)
    np.frombuffer(data, np.uint8)[:] = np.frombuffer(lease.view[:nbytes], np.uint8)
    return data


def _fill(lease: Lease, data: Bytes) -> None:
    view = np.frombuffer(lease.view[: len(data)], np.uint8)
    view[:] = np.frombuffer(data, np.uint8)
