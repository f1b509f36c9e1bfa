"""OFFER and its answers: whoever computes a prompt has an engine fetch it, by a TAKE of its own.

docs/protocol.md lays them out. Nothing here does I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from tierloom.stages.kv.object import LINK
from tierloom.stages.tiers.server import protocol as wire

_OFFER = struct.Struct("<32sHHI")
_PROGRESS = struct.Struct("<B3xI")
_HOST = 255
"""Bytes of a host, at most."""


class HandoffOffer(NamedTuple):
    """Where to ask, and for what."""

    ticket: bytes
    """32 bytes."""
    host: str
    port: int
    chunks: Sequence[bytes]
    """Grain links of each, from the head of the prompt on; only the last may have fewer."""

    def pack(self) -> bytes:
        """Of a prompt that is too long for a message, its head."""
        host, grains = self.host.encode("ascii"), len(self.chunks[0]) // LINK
        fit = (wire.BODY - _OFFER.size - len(host)) // len(self.chunks[0])
        head = _OFFER.pack(self.ticket, self.port, len(host), grains)
        return head + host + b"".join(self.chunks[:fit])

    @classmethod
    def unpack(cls, body: bytes) -> HandoffOffer:
        """Raises BadMessage."""
        if len(body) < _OFFER.size:
            raise wire.BadMessage(f"an OFFER of {len(body)} bytes")
        ticket, port, length, grains = _OFFER.unpack_from(body)
        host, links = body[_OFFER.size :][:length], body[_OFFER.size + length :]
        text = host.decode("ascii", "replace")
        if not 0 < length <= _HOST or len(host) != length or not text.isprintable() or not port:
            raise wire.BadMessage("an OFFER of an engine that cannot be dialed")
        size = grains * LINK
        if not links or not size or len(links) % LINK or len(links) > wire.KEYS * size:
            raise wire.BadMessage("an OFFER of no chunks, or of parts of them")
        chunks = [links[at : at + size] for at in range(0, len(links), size)]
        return cls(ticket, text, port, chunks)


class OfferProgress(NamedTuple):
    """How an offer stands."""

    going: bool
    """More may come; the next one is said within a second."""
    here: int
    """Chunks of it that the engine has, once nothing more comes."""

    def pack(self) -> bytes:
        return _PROGRESS.pack(self.going, self.here)

    @classmethod
    def unpack(cls, body: bytes, count: int) -> OfferProgress:
        """Of an offer of `count` chunks. Raises BadMessage."""
        if len(body) != _PROGRESS.size:
            raise wire.BadMessage(f"an OFFERED of {len(body)} bytes")
        going, here = _PROGRESS.unpack(body)
        if going > 1 or here > count:
            raise wire.BadMessage("an OFFERED that contradicts the offer")
        return cls(bool(going), here)
