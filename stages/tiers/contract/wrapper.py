"""A tier around another one: everything is forwarded but what a subclass does itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tierloom.stages.errors import Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.tiers.contract.tier import Found, Read, Tier, TierStat

if TYPE_CHECKING:
    from tierloom.stages.tiers.contract.index import Entry, LifeWatch


class WrapperTier(Tier):
    """Its counters, and what it says of itself, are those of the tier that it wraps."""

    def __init__(self, tier: Tier) -> None:
        super().__init__(tier.ctx)
        self.wrap(tier)

    def wrap(self, tier: Tier) -> None:
        self.tier, self.counts = tier, tier.counts
        self.local, self.in_arena, self.read_only = tier.local, tier.in_arena, tier.read_only
        self.one_by_one = tier.one_by_one

    @property
    def address(self) -> str:
        return self.tier.address

    async def open(self) -> None:
        await self.tier.open()

    async def close(self) -> None:
        await self.tier.close()

    def find(self, links: bytes) -> Found | None:
        return self.tier.find(links)

    def hold(self, key: bytes) -> Object | None:
        return self.tier.hold(key)

    def touch(self, keys: Sequence[bytes]) -> None:
        self.tier.touch(keys)

    def order_for_eviction(self, keys: Sequence[bytes]) -> None:
        self.tier.order_for_eviction(keys)

    def follow(self, lives: LifeWatch) -> None:
        self.tier.follow(lives)

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return await self.tier.exists(keys)

    async def prefix_length(self, keys: Sequence[bytes]) -> int:
        return await self.tier.prefix_length(keys)

    async def read(self, reads: Sequence[Read]) -> None:
        await self.tier.read(reads)

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        return await self.tier.put(objects)

    async def delete(self, keys: Sequence[bytes]) -> int:
        return await self.tier.delete(keys)

    async def clear(self) -> int:
        return await self.tier.clear()

    def stat(self) -> TierStat:
        return self.tier.stat()

    def pin(self, keys: Sequence[bytes], *, pinned: bool = True) -> int:
        return self.tier.pin(keys, pinned=pinned)

    def lease(self, keys: Sequence[bytes], *, leased: bool = True) -> int:
        return self.tier.lease(keys, leased=leased)

    def entries(self) -> list[Entry[Any]]:
        return self.tier.entries()

    def age(self, entry: Entry[Any]) -> float:
        return self.tier.age(entry)
