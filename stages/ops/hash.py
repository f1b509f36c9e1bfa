"""hash: tokens to the chain of grain links, and chunks named by them.

    keys: {use: hash}

`link_i = sha256(link_{i-1} || grain_i as little-endian int32)`, and the link before the first grain
is the namespace's digest. A chunk's key is its last link.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from tierloom.stages.contract.batch import Piece, Span
from tierloom.stages.contract.request import Ticket
from tierloom.stages.contract.stage import Lane, Stage
from tierloom.stages.kv.namespace import tlv
from tierloom.stages.kv.object import LINK

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_SLICE = 512
"""Grains hashed between two chances for another thread to take the GIL."""


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
        """Hash the tokens that follow; what is left over of a grain must be given again."""
        whole = len(tokens) // self.grain * self.grain
        last = self.links[-1] if self.links else self.seed
        self.links += grain_links(last, tokens[:whole], self.grain)

    def mix(self, extra: bytes) -> None:
        """Let the last link, and so all that follow, depend on more than tokens: `extra` says on
        what (canonically encoded; see `namespace.tlv`)."""
        self.links[-1] = sha256(tlv(("link", self.links[-1]), ("extra", extra))).digest()

    def span(self, first: int, last: int, *, place: int = 0) -> Span:
        """Grains `first` to `last`, without the last; `first` must begin a chunk."""
        return Span(
            links=b"".join(self.links[first:last]),
            parent=self.links[first - 1] if first else self.seed,
            tokens=(last - first) * self.grain,
            place=place,
            start=first * self.grain,
        )


def chunks(span: Span, *, chunk: int, grain: int, partial: bool) -> list[Piece]:
    """Cut a named prompt into chunks; the short last one only when `partial`."""
    tokens = span.tokens if partial else span.tokens // chunk * chunk
    links, step = span.links, chunk // grain * LINK
    return [
        Piece(
            index=i,
            start=i * chunk,
            tokens=min(chunk, tokens - i * chunk),
            links=links[i * step : (i + 1) * step],
            parent=links[i * step - LINK : i * step] if i else span.parent,
            position=span.start + i * chunk if span.start >= 0 else -1,
        )
        for i in range(-(-tokens // chunk))
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class HashOptions:
    """None: what is hashed is settled by `chunk:` and the namespace."""


class Hash(Stage):
    """Names a request's chunks."""

    Options = HashOptions
    takes = "tokens@host/request"
    gives = "keys@host/request"
    lane = Lane.POOL

    def plan(self, ticket: Ticket) -> None:
        c, span = self.ctx.chunk, ticket.span
        if span is None:
            tokens = ticket.tokens
            if self.ctx.geometry.native:  # a started block cannot be kept as a block
                block = self.ctx.geometry.block_tokens
                tokens = tokens[: len(tokens) // block * block]
            links = b"".join(grain_links(ticket.seed, tokens, c.grain))
            span = Span(links, ticket.seed, len(tokens), start=0)
        ticket.pieces = chunks(span, chunk=c.tokens, grain=c.grain, partial=c.partial)
