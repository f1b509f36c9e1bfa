"""The messages by which one process has objects written into its memory by another, as
docs/protocol.md lays them out."""

from __future__ import annotations

import struct
from typing import NamedTuple

from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.protocol import BadMessage

PIECE = 4 << 20
"""Bytes of one write, so that little is ever in doubt."""
METADATA = 64 << 10
"""Bytes of an agent's metadata, at most."""
NAME = 64

_CARD = struct.Struct("<64sQQ32s")
_LANDING = struct.Struct("<32sIIQQQQ")
_LANDED = struct.Struct("<B3xIQ")
_NOTE = struct.Struct("<QI")


class AgentCard(NamedTuple):
    """An agent that receives."""

    name: str
    """Never used twice."""
    address: int
    nbytes: int
    """The memory that may be written into."""
    metadata: bytes
    proof: bytes = b""

    @property
    def said(self) -> bytes:
        """What is proved."""
        head = _CARD.pack(self.name.encode(), self.address, self.nbytes, b"")
        return head + self.metadata

    def holds(self, place: LandingPlace) -> bool:
        """A place lies in this memory."""
        return (
            self.address <= place.address
            and place.room <= self.nbytes
            and place.address - self.address <= self.nbytes - place.room
        )

    def pack(self) -> bytes:
        fields = (self.name.encode(), self.address, self.nbytes, self.proof)
        return _CARD.pack(*fields) + self.metadata

    @classmethod
    def of(cls, body: bytes) -> AgentCard:
        """Raises BadMessage."""
        if not _CARD.size < len(body) <= _CARD.size + METADATA:
            raise BadMessage(f"an agent's description of {len(body)} bytes")
        name, address, nbytes, proof = _CARD.unpack_from(body)
        text = name.rstrip(b"\0").decode("ascii", "replace")
        if not text.isprintable() or not text or address + nbytes > 1 << 63:
            raise BadMessage("an agent's description contradicts itself")
        return cls(text, address, nbytes, body[_CARD.size :], proof)


class LandingPlace(NamedTuple):
    """An object of a LAND: as in GET, and where its bytes may be written."""

    key: bytes
    first: int
    upto: int
    nbytes: int
    address: int
    room: int
    """Bytes from `address` on."""
    ticket: int
    """By which the notes of its writes name it."""

    @property
    def wanted(self) -> wire.Wanted:
        return wire.Wanted(self.key, self.first, self.upto, self.nbytes)


class Landed(NamedTuple):
    """The writes of one object are over, `posted` of them."""

    code: int
    posted: int
    ticket: int


def pack_places(places: list[LandingPlace]) -> bytes:
    return b"".join([_LANDING.pack(*place) for place in places])


def places_of(body: bytes, card: AgentCard) -> list[LandingPlace]:
    """Raises BadMessage: also where one lies outside of the agent's memory."""
    count, rest = divmod(len(body), _LANDING.size)
    if rest or not 0 < count <= wire.OBJECTS:
        raise BadMessage(f"body of {len(body)} bytes is not up to {wire.OBJECTS} places to land")
    places = [LandingPlace(*fields) for fields in _LANDING.iter_unpack(body)]
    if not all(card.holds(place) for place in places):
        raise BadMessage("a place to land outside of the memory that was declared")
    return places


def landing_of(body: bytes, asked: LandingPlace, largest: int) -> wire.Item:
    """What is about to be written; with code BYTES nothing, as it is longer than the place. Raises
    BadMessage."""
    item = wire.unpack(wire.Item, body)
    if item.code == wire.BYTES:
        return item
    item = wire.item_of(body, asked.wanted, largest)
    if item.end - item.begin > asked.room:
        raise BadMessage("more bytes are about to land than there is room for")
    return item


def pack_landed(landed: Landed) -> bytes:
    return _LANDED.pack(*landed)


def landed_of(body: bytes) -> Landed:
    """Raises BadMessage."""
    if len(body) != _LANDED.size:
        raise BadMessage(f"body of {len(body)} bytes is not one record of {_LANDED.size}")
    return Landed(*_LANDED.unpack(body))


def pack_note(ticket: int, piece: int) -> bytes:
    return _NOTE.pack(ticket, piece)


def note_of(note: bytes) -> tuple[int, int] | None:
    """Ticket and piece; None: it is no note of ours."""
    if len(note) != _NOTE.size:
        return None
    ticket, piece = _NOTE.unpack(note)
    return ticket, piece


def pieces(nbytes: int) -> int:
    return -(-nbytes // PIECE)
