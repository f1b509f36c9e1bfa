"""What the workers keep, as the scheduler's thread knows it: no I/O, one dictionary look a grain.

Fed by what the workers tell. A chunk counts as kept where every share of it is (each
tensor-parallel rank, pipeline stage and KV group keeps its own), in whatever local tier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tierloom.stages.tiers.contract.index import split


class Kept:
    """One chunk, and who keeps it where."""

    __slots__ = ("key", "tier", "tiers")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.tiers: dict[str, int] = {}
        """Tier to a bit for each share that is there."""
        self.tier = ""
        """The slowest tier from which a share must come; empty: a share is missing."""


class Part(NamedTuple):
    """Tokens of a chunk that can be loaded, and from where."""

    tokens: int
    tier: str


class Mirror:
    """Chunks by key and by inner link. Used by the scheduler's thread alone."""

    def __init__(self, tiers: Sequence[str], *, shares: int, chunk: int, grain: int) -> None:
        """`tiers`: best first. `shares`: how many must keep a chunk. `chunk`, `grain`: tokens."""
        self._tiers, self._everyone = tiers, (1 << shares) - 1
        self._per, self._grain = chunk // grain, grain
        self._kept: dict[bytes, Kept] = {}
        self._inner: dict[bytes, Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self._kept.clear()
        self._inner.clear()

    def note(self, share: int, tier: str, kept: bool, links: bytes) -> tuple[bytes, bool] | None:
        """A share of a chunk came to a tier, or went. The chunk's key, and whether it can be loaded
        now, where that has changed."""
        chain = split(links)
        key, bit = chain[-1], 1 << share
        chunk = self._kept.get(key)
        if chunk is None:
            if not kept:
                return None
            chunk = self._kept[key] = Kept(key)
            for link in chain[:-1]:
                self._inner[link] = chunk
        was = chunk.tier
        mask = chunk.tiers.get(tier, 0)
        chunk.tiers[tier] = mask | bit if kept else mask & ~bit
        self._judge(chunk)
        if not any(chunk.tiers.values()):
            del self._kept[key]
            for link in chain[:-1]:
                if self._inner.get(link) is chunk:
                    del self._inner[link]
        return (key, bool(chunk.tier)) if bool(was) != bool(chunk.tier) else None

    def has(self, key: bytes) -> bool:
        """Exactly this chunk can be loaded."""
        chunk = self._kept.get(key)
        return chunk is not None and bool(chunk.tier)

    def find(self, links: Sequence[bytes], most: int) -> list[Part]:
        """The longest kept prefix of a prompt, chunk by chunk, up to `most` tokens."""
        found: list[Part] = []
        per, grain, tokens = self._per, self._grain, 0
        for at in range(0, len(links), per):
            if tokens >= most:
                break
            size = min(per, len(links) - at)
            for grains in range(size, 0, -1):
                link = links[at + grains - 1]
                chunk = self._kept.get(link) or self._inner.get(link)
                if chunk is not None and chunk.tier:
                    take = min(grains * grain, most - tokens)
                    found.append(Part(take, chunk.tier))
                    tokens += take
                    break
            else:
                break
            if grains < per:
                break
        return found

    def _judge(self, chunk: Kept) -> None:
        """Whether all shares are there, when each comes from its best tier."""
        together, chunk.tier = 0, ""
        for tier in self._tiers:
            more = together | chunk.tiers.get(tier, 0)
            if more != together:
                together = more
                if together == self._everyone:
                    chunk.tier = tier
