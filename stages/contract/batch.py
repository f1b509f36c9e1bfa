"""What travels through a graph: pieces of a request, in batches.

Failure is data here: a piece that is lost rides on with the rest and is reported at the end, so
that leases go home and gates open by the same road, whatever happened.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from tierloom.stages.contract.request import Ticket
from tierloom.stages.errors import BadObject, Lost
from tierloom.stages.kv.object import LINK, Header, Object
from tierloom.stages.memory.arena import Lease

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Span(NamedTuple):
    """A prompt, or the part of one that begins with a chunk, named instead of spelt out."""

    links: bytes
    """Its grain links, 32 bytes each."""
    parent: bytes
    """The link before its first token."""
    tokens: int
    """How many tokens the links stand for."""
    place: int = 0
    """Retrieve: tokens that are wanted of it; 0: all that are found."""
    start: int = -1
    """Position in the prompt of its first token; -1: not known."""


@dataclass(slots=True)
class Piece:
    """One chunk of a request on its way."""

    index: int
    """Which chunk of the prompt."""
    start: int
    """Its first token, as the request counts them."""
    tokens: int
    links: bytes
    """Its grain links; the last is its key."""
    parent: bytes
    """The link before its first token."""
    position: int = -1
    """Its first token, as the whole prompt counts them; -1: not known."""
    take: int = 0
    """Retrieve: tokens of it that will be placed, from its start."""
    source: bytes = b""
    """Retrieve: key of the object that serves it; not its own when only its first grains match."""
    tiers: list[str] = field(default_factory=list)
    """Retrieve: tiers that have it, best first. Store: tiers that lack it."""
    object: Object | None = None
    """As stored. Its lease belongs to the batch's scope."""
    plain: Object | None = None
    """Decoded, where `object` is encoded; its frames are verified already."""
    checksums: npt.NDArray[np.uint64] | None = None
    done: int = 0
    """A bit for each layer group that is gathered, or placed. Changed by `Ticket.done_with`."""
    encoded: dict[Any, Encoded] = field(default_factory=dict)
    """Store: what each encoding stage made of it, by stage."""
    put: set[str] = field(default_factory=set)
    """Store: tiers that it was offered to."""
    took: set[str] = field(default_factory=set)
    """Store: tiers that keep it. Retrieve: the tier that delivered it."""
    nbytes: int = 0
    """KV bytes gathered, or placed."""
    lost: Lost | None = None
    refused: BadObject | None = None
    """Retrieve: why the object that came is of no use."""

    @property
    def key(self) -> bytes:
        return self.links[-LINK:]

    def leases(self) -> list[Lease]:
        """All that holds it, in whatever form: what a call on it may touch."""
        encoded = tuple(self.encoded.values())  # at once: another branch may add its own
        forms = (self.object, self.plain, *[e.object for e in encoded])
        return [form.lease for form in forms if form is not None]


@dataclass(slots=True)
class Encoded:
    """A chunk's frames as an encoder left them, until all are there and become one object."""

    frames: list[EncodedFrame | None]
    """Those of all scans, scan by scan."""
    scans: int = 1
    object: Object | None = None
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    """Held while the object is put together, when two tiers want it at once."""

    @property
    def whole(self) -> bool:
        return all(f is not None for f in self.frames)


class EncodedFrame(NamedTuple):
    """One frame's bytes, still where the encoder put them."""

    data: bytes | memoryview
    raw: int
    codecs: bytes


class Scope:
    """What a batch of chunks holds while any of its branches or waves is still under way."""

    __slots__ = ("_deferred", "open", "pieces")

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.open = 0
        self._deferred: list[Callable[[], Awaitable[None] | None]] = []

    def defer(self, give_back: Callable[[], Awaitable[None] | None]) -> None:
        """Run this, last first, when the last branch has ended."""
        self._deferred.append(give_back)

    def pop(self) -> Callable[[], Awaitable[None] | None] | None:
        return self._deferred.pop() if self._deferred else None


@dataclass(slots=True)
class Batch:
    """Chunks of one ticket that go together, and which frames of them."""

    ticket: Ticket
    scope: Scope
    frames: range
    forked: bool = False
    """On a branch: what is lost here is lost to this branch only."""
    lost: set[int] = field(default_factory=set)
    """Indices of pieces lost to this branch."""
    encoder: object | None = None
    """The stage whose encoding this branch carries; None: the plain object."""
    passed: bool = False
    """Beyond the stage that touches the engine's memory."""

    @property
    def live(self) -> list[Piece]:
        return [p for p in self.scope.pieces if p.lost is None and p.index not in self.lost]

    def frames_of(self, header: Header) -> range:
        """The frames of an object's first scan that go with this batch. One that was written with
        another layer group goes whole, with the first wave."""
        if header.group == self.ticket.group:
            return self.frames
        return range(header.groups if self.frames.start == 0 else 0)

    def lose(self, piece: Piece, code: Lost) -> None:
        self.ticket.tally(code)
        if self.forked:
            self.lost.add(piece.index)
        else:
            piece.lost = code

    def leases(self) -> list[Lease]:
        """What a call on it may touch."""
        return [lease for piece in self.scope.pieces for lease in piece.leases()]

    def refuse(self, piece: Piece, error: BadObject) -> None:
        """The piece's object came, and is of no use."""
        piece.refused = error
        self.lose(piece, error.lost)

    def fork(self) -> Batch:
        """The same chunks for one of several readers."""
        return replace(self, forked=True, lost=set(self.lost))

    def defer(self, give_back: Callable[[], Awaitable[None] | None]) -> None:
        self.scope.defer(give_back)
