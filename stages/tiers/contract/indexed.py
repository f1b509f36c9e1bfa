"""A tier with an index in this process: what is kept, the index says, at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from tierloom.stages.tiers.contract.index import Entry, Index, LifeWatch
from tierloom.stages.tiers.contract.tier import Found, Tier, TierStat

P = TypeVar("P")


class IndexedTier(Tier, Generic[P]):
    """`P` says where an object is. Subclasses move the bytes."""

    local = True

    _index: Index[P]
    """Set by the subclass."""
    _capacity: int
    """Bytes kept at most; set by the subclass."""

    def find(self, links: bytes) -> Found | None:
        return self._index.find(links)

    def touch(self, keys: Sequence[bytes]) -> None:
        self._index.touch(keys)

    def order_for_eviction(self, keys: Sequence[bytes]) -> None:
        self._index.order_for_eviction(keys)

    def follow(self, lives: LifeWatch) -> None:
        self._index.lives = lives

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return [self._index.get(key) is not None for key in keys]

    def stat(self) -> TierStat:
        return TierStat(len(self._index), self._index.nbytes, self._capacity)

    def pin(self, keys: Sequence[bytes], *, pinned: bool = True) -> int:
        return sum(self._index.pin(key, pinned=pinned) for key in keys)

    def lease(self, keys: Sequence[bytes], *, leased: bool = True) -> int:
        return sum(self._index.pin(key, pinned=leased, lease=True) for key in keys)

    def entries(self) -> list[Entry[Any]]:
        with self._index.lock:
            return list(self._index)

    def age(self, entry: Entry[Any]) -> float:
        return self._index.age(entry)
