"""TAKE and its answers: objects that another engine has promised, piece by piece as they come.

docs/protocol.md lays them out. Nothing here does I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from tierloom.stages.errors import Lost
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.server import protocol as wire

LATER = 1
"""Flag of TAKE: the ticket may be opened after it was asked for."""
_TAKE = struct.Struct("<32sIBB2x")
_PIECE = struct.Struct("<IB3xQQQ")
_CODES = frozenset([wire.DONE, *Lost])
MOST_WAIT = 30.0
"""Seconds for which a holder lets one piece be waited for, at most."""


class Take(NamedTuple):
    """What is asked for."""

    ticket: bytes
    """32 bytes: the digest of its name."""
    wait: float
    """Seconds for which each piece may be waited for."""
    later: bool
    """The ticket may be opened after this question."""
    keys: Sequence[bytes]
    askers: int = 1
    """Workers that ask this one for the same ticket: it ends with the last of them."""

    def pack(self) -> bytes:
        flags = LATER if self.later else 0
        head = _TAKE.pack(self.ticket, round(self.wait * 1000), flags, min(self.askers, 255))
        return head + b"".join(self.keys)

    @classmethod
    def unpack(cls, body: bytes) -> Take:
        """Raises BadMessage."""
        if len(body) < _TAKE.size:
            raise wire.BadMessage(f"a TAKE of {len(body)} bytes")
        ticket, wait, flags, askers = _TAKE.unpack_from(body)
        keys = wire.keys_of(body[_TAKE.size :])
        later = bool(flags & LATER)
        return cls(ticket, min(wait / 1000, MOST_WAIT), later, keys, askers or 1)


class PieceHead(NamedTuple):
    """Bytes `begin` to `end` of the object under key number `chunk` follow; where `code` is not
    DONE, none and no more of it. The piece that begins an object comes last."""

    chunk: int
    code: int = wire.DONE
    nbytes: int = 0
    """Of the whole object."""
    begin: int = 0
    end: int = 0

    def pack(self) -> bytes:
        return _PIECE.pack(*self)

    @classmethod
    def unpack(cls, body: bytes, count: int, largest: int) -> PieceHead:
        """Of an answer about `count` keys, to whoever takes no object of more than `largest` bytes.
        Raises BadMessage."""
        if len(body) != _PIECE.size:
            raise wire.BadMessage(f"a PIECE of {len(body)} bytes")
        piece = cls(*_PIECE.unpack(body))
        if piece.chunk >= count or piece.code not in _CODES:
            raise wire.BadMessage("a piece of what was not asked for, or of unknown code")
        if piece.code:
            return piece
        whole = PAGE <= piece.nbytes <= largest and not piece.nbytes % PAGE
        if not whole or not piece.begin < piece.end <= piece.nbytes:
            raise wire.BadMessage("lengths of a piece contradict each other")
        return piece
