"""blackhole: accepts everything, stores nothing.

    cold: {use: blackhole}

Measures what storing costs before a tier: hashing, gathering, encoding and copies are done, nothing
else. Puts succeed (`full` refuses them), and nothing is ever found, at no cost in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tierloom.stages.errors import Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.tiers.contract.tier import (
    Found,
    Read,
    Tier,
    TierContext,
    TierStat,
    require_sealed,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlackholeOptions:
    """No options."""


class Blackhole(Tier):
    """Local, so that nobody waits for its answer."""

    Options = BlackholeOptions
    local = True

    def __init__(self, options: BlackholeOptions, ctx: TierContext) -> None:
        super().__init__(ctx)

    def find(self, links: bytes) -> Found | None:
        return None

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return [False] * len(keys)

    async def read(self, reads: Sequence[Read]) -> None:
        for read in reads:
            read.lost = Lost.ABSENT
        self.counts.misses += len(reads)

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        require_sealed(*objects)
        self.counts.puts += len(objects)
        self.counts.bytes_in += sum(obj.header.nbytes for obj in objects)
        return [None] * len(objects)

    async def delete(self, keys: Sequence[bytes]) -> int:
        return 0

    async def clear(self) -> int:
        return 0

    def stat(self) -> TierStat:
        return TierStat(0, 0, 0)

    def pin(self, keys: Sequence[bytes], *, pinned: bool = True) -> int:
        return 0

    def lease(self, keys: Sequence[bytes], *, leased: bool = True) -> int:
        return 0
