"""Lent: what other engines have put into memory of this one that it does not use."""

from __future__ import annotations

from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.stages.tiers.memory.tier import Memory, MemoryOptions

LENT = "(lent)"
"""Its name; no tier of a file is called so."""


class Lent(Memory):
    """It is no tier of a file, and the arena does not grow by it: it lies in what memory tiers have
    room for, and goes before anything of theirs."""

    def __init__(self, most: int, ctx: TierContext) -> None:
        """`most`: bytes, which may be more than there ever is room for."""
        super().__init__(MemoryOptions(capacity=most), ctx)

    async def open(self) -> None:
        self.ctx.arena.reclaim.insert(0, self._reclaim)

    def make_way(self, nbytes: int) -> bool:
        """Evict until so many bytes of the memory tiers' room are nobody's; False: they are not."""
        while self.ctx.arena.idle < nbytes and self._evict():
            pass
        return self.ctx.arena.idle >= nbytes
