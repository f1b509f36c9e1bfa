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

from .base import Lane, Stage
from .payload import Piece

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .ticket import Ticket

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


def chunks(
    seed: bytes, tokens: npt.NDArray[np.int32], *, chunk: int, grain: int, partial: bool
) -> list[Piece]:
    """Cut a prompt into named chunks; the short last one only when `partial`."""
    if not partial:
        tokens = tokens[: len(tokens) // chunk * chunk]
    links, per = grain_links(seed, tokens, grain), chunk // grain
    return [
        Piece(
            index=i,
            start=i * chunk,
            tokens=min(chunk, len(tokens) - i * chunk),
            links=b"".join(links[i * per : (i + 1) * per]),
            parent=links[i * per - 1] if i else seed,
        )
        for i in range(-(-len(tokens) // chunk))
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
        c, tokens = self.ctx.chunk, ticket.tokens
        if self.ctx.geometry.native:  # a started block cannot be kept as a block
            block = self.ctx.geometry.block_tokens
            tokens = tokens[: len(tokens) // block * block]
        ticket.pieces = chunks(
            ticket.seed, tokens, chunk=c.tokens, grain=c.grain, partial=c.partial
        )
