"""A prompt's names: the chain of hashes over its grains, and parts of it that are named by them.

`link_i = sha256(link_{i-1} || grain_i as little-endian int32)`, and the link before the first grain
is the namespace's digest. A chunk's key is its last link.
"""

from __future__ import annotations

import sys
import time
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

from tierloom.stages.kv.namespace import tlv
from tierloom.stages.kv.text import OPENING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_SLICE = 512
"""Grains hashed between two chances for another thread to take the GIL."""


class Span(NamedTuple):
    """A prompt, or the part of one that begins with a chunk, named instead of spelled out."""

    links: bytes
    """Its grain links, 32 bytes each."""
    parent: bytes
    """The link before its first token."""
    tokens: int
    """How many tokens the links name."""
    wanted: int = 0
    """Retrieve: tokens that are wanted of it; 0: all that are found."""
    start: int = -1
    """Position in the prompt of its first token; -1: not known."""
    root: bytes = b""
    """The link before the prompt's first token; empty: not known."""
    opening: bytes = b""
    """The link after the prompt's first 64 tokens; empty: not known."""


def grain_links(seed: bytes, tokens: npt.NDArray[np.int32], grain: int) -> list[bytes]:
    """The links (32 bytes each) of `tokens`, grain by grain; the last grain may be short."""
    data = tokens if sys.byteorder == "little" else tokens.astype("<i4")
    raw, step, link = data.tobytes(), 4 * grain, seed
    links: list[bytes] = []
    append, fresh = links.append, sha256().copy
    for start in range(0, len(raw), _SLICE * step):
        for at in range(start, min(len(raw), start + _SLICE * step), step):
            h = fresh()  # a copy costs half of what a new one does
            h.update(link + raw[at : at + step])
            link = h.digest()
            append(link)
        if len(raw) > _SLICE * step:
            time.sleep(0)
    return links


def chunk_keys(seed: bytes, tokens: npt.NDArray[np.int32], grain: int, chunk: int) -> list[bytes]:
    """Keys of a prompt's chunks, the last of which may be short."""
    links, step = grain_links(seed, tokens, grain), chunk // grain
    return [links[min(at + step, len(links)) - 1] for at in range(0, len(links), step)]


class Chain:
    """The links of one prompt's whole grains, grown as the prompt grows: nothing is hashed twice.

    For callers who ask about a prompt again and again, and hand out parts of it by name.
    """

    __slots__ = ("grain", "links", "seed")

    def __init__(self, seed: bytes, grain: int) -> None:
        """`seed`: the namespace's digest. `grain`: tokens of a grain."""
        self.seed, self.grain = seed, grain
        self.links: list[bytes] = []

    @property
    def tokens(self) -> int:
        """Tokens that have a link."""
        return len(self.links) * self.grain

    def extend(self, tokens: npt.NDArray[np.int32]) -> None:
        """Hash the tokens that follow; the rest of a started grain must be given again."""
        whole = len(tokens) // self.grain * self.grain
        last = self.links[-1] if self.links else self.seed
        self.links += grain_links(last, tokens[:whole], self.grain)

    def mix(self, extra: bytes) -> None:
        """Make the last link, and so all that follow, depend on `extra` as well (canonically
        encoded; see `namespace.tlv`)."""
        self.links[-1] = sha256(tlv(("link", self.links[-1]), ("extra", extra))).digest()

    def span(self, first: int, last: int, *, wanted: int = 0) -> Span:
        """Grains `first` to `last`, without the last; `first` must begin a chunk."""
        return Span(
            links=b"".join(self.links[first:last]),
            parent=self.links[first - 1] if first else self.seed,
            tokens=(last - first) * self.grain,
            wanted=wanted,
            start=first * self.grain,
            root=self.seed,
            opening=self.opening,
        )

    @property
    def opening(self) -> bytes:
        """The link after the first 64 tokens; that before the first where there are fewer."""
        grains = -(-OPENING // self.grain)
        return self.links[grains - 1] if len(self.links) >= grains else self.seed
