"""What keeps the index of texts true: told by tiers what comes and goes, and by headers what was
there before."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tierloom.pipeline.run.tier_stack import Note
from tierloom.stages.errors import ArenaFull
from tierloom.stages.kv.object import LINK
from tierloom.stages.kv.text import Text
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import Read

if TYPE_CHECKING:
    from tierloom.stages.directory.text_index import TextIndex


class KeptTexts:
    """Feeds a `TextIndex` with what lies in the local tiers of a pipeline."""

    def __init__(self, index: TextIndex, tiers: Mapping[str, CircuitBreaker], arena: Arena) -> None:
        self.index, self._tiers, self._arena = index, tiers, arena
        self._untold: deque[tuple[str, bytes]] | None = deque()
        """Tier and key of what was there at the start; None: all of it has been read. What comes
        without a text later has none in its header either."""

    def note(self, tier: str, kept: bool, links: bytes, text: Text | None = None) -> None:
        """As `TierWatch`; any thread."""
        key = links[-LINK:]
        if not kept:
            if not self._kept(key):
                self.index.remove(key)
        elif text is not None:
            self.index.add(key, text)
        elif (untold := self._untold) is not None:
            untold.append((tier, key))

    async def read_headers(self, note: Note) -> None:
        """Read the headers of what was there at the start, one after another, and tell `note`."""
        while self._untold:
            tier, key = self._untold.popleft()
            found = self._tiers[tier].find(key)
            if key in self.index or found is None or found.key != key:
                continue
            read = Read(key, 0)
            try:
                await self._arena.promises.reserve(found.nbytes)
            except ArenaFull:  # kept by an engine whose arena was larger
                continue
            try:
                await self._tiers[tier].read([read])
                if read.object is not None:
                    header = read.object.header
                    if header.text is not None:
                        note(tier, True, header.links, header.text)
            finally:
                if read.object is not None:
                    read.object.lease.release()
                self._arena.promises.unreserve(found.nbytes)
        self._untold = None

    def _kept(self, key: bytes) -> bool:
        found = (t.find(key) for t in self._tiers.values() if t.local)
        return any(f is not None and f.key == key for f in found)
