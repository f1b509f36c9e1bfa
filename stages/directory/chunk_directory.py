"""Who holds which chunk, by holder and tier: no I/O, one dictionary lookup per grain.

Fed by what the holders tell of their tiers. A chunk can be loaded if every holder has its part of
it (each tensor-parallel rank, pipeline stage and KV group of an engine keeps its own), in whatever
tier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tierloom.stages.tiers.contract.index import split


@dataclass(slots=True, eq=False)
class HeldChunk:
    """One chunk, and who holds it where."""

    key: bytes
    nbytes: int
    tiers: dict[str, int] = field(default_factory=dict)
    """Tier to a bit for each holder that has it there."""
    tier: str = ""
    """The slowest tier from which a part must be loaded; empty: a part is missing."""


class Part(NamedTuple):
    """Tokens of a chunk that can be loaded, and from where."""

    tokens: int
    tier: str


class ChunkDirectory:
    """Chunks by key and by inner link. Not thread-safe."""

    def __init__(
        self, tiers: Sequence[str], *, holders: int = 1, chunk: int = 1, grain: int = 1
    ) -> None:
        """`tiers`: best first. `holders`: how many must have a chunk. `chunk`, `grain`: tokens."""
        self.nbytes = 0
        """Of all chunks, as `note` was told."""
        self._tiers, self._everyone = tiers, (1 << holders) - 1
        self._per, self._grain = chunk // grain, grain
        self._chunks: dict[bytes, HeldChunk] = {}
        self._inner: dict[bytes, HeldChunk] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def keys(self) -> list[bytes]:
        return list(self._chunks)

    def clear(self) -> None:
        self._chunks.clear()
        self._inner.clear()
        self.nbytes = 0

    def note(
        self, holder: int, tier: str, kept: bool, links: bytes, nbytes: int = 0
    ) -> tuple[bytes, bool] | None:
        """A chunk came to a tier of a holder, or left it. `links`: its grain links, the last is its
        key. Returns the key and whether it can be loaded now, if that has changed."""
        chain = split(links)
        key, bit = chain[-1], 1 << holder
        chunk = self._chunks.get(key)
        if chunk is None:
            if not kept:
                return None
            chunk = self._chunks[key] = HeldChunk(key, nbytes)
            self.nbytes += nbytes
            for link in chain[:-1]:
                self._inner[link] = chunk
        was = chunk.tier
        mask = chunk.tiers.get(tier, 0)
        chunk.tiers[tier] = mask | bit if kept else mask & ~bit
        chunk.tier = self._slowest(chunk)
        if not any(chunk.tiers.values()):
            del self._chunks[key]
            self.nbytes -= chunk.nbytes
            for link in chain[:-1]:
                if self._inner.get(link) is chunk:
                    del self._inner[link]
        return (key, bool(chunk.tier)) if bool(was) != bool(chunk.tier) else None

    def has(self, key: bytes) -> bool:
        """Exactly this chunk can be loaded."""
        chunk = self._chunks.get(key)
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
                chunk = self._chunks.get(link) or self._inner.get(link)
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

    def _slowest(self, chunk: HeldChunk) -> str:
        """The tier of the last part, when each comes from its best tier; empty: one is missing."""
        together = 0
        for tier in self._tiers:
            together |= chunk.tiers.get(tier, 0)
            if together == self._everyone:
                return tier
        return ""
