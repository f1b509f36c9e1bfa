"""One chunk of a request: its name, the plan for it, and what has become of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from tierloom.stages.errors import BadObject, Lost
from tierloom.stages.kv.object import LINK, Object
from tierloom.stages.kv.text import Excerpt, Text
from tierloom.stages.memory.arena import Lease

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(slots=True)
class Source:
    """The plan of a retrieve for one chunk."""

    key: bytes
    """Key of the object to read: another chunk's where only its first grains are the same."""
    tokens: int
    """Tokens that will be placed, from the chunk's start."""
    tiers: list[str]
    """Tiers that have the object and were not tried yet, best first."""
    excerpt: Excerpt | None = None
    """Where in the object the tokens lie, when they are not its first: text captured elsewhere."""

    @property
    def rows(self) -> int:
        """Tokens of the object up to the last that is wanted."""
        return self.tokens + (self.excerpt.first if self.excerpt is not None else 0)


@dataclass(slots=True)
class Chunk:
    """Made by the stage that names chunks, and changed by the stages after it."""

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
    text: Text | None = None
    """Store: what its header is to say of its text."""
    source: Source | None = None
    """Retrieve: where it is read; None: nothing of it is found. Store: where its first tokens are
    read, which the caller does not have."""
    missing_in: list[str] = field(default_factory=list)
    """Store: tiers that do not have it."""
    object: Object | None = None
    """As stored. The batch's resources hold its lease."""
    room: bool = True
    """Memory is promised for all that is made of it. Retrieve: not where it lies in the arena."""
    head: Object | None = None
    """Store: what `source` names, as it was read."""
    plain: Object | None = None
    """Decoded, where `object` is encoded; its frames are verified already."""
    checksums: npt.NDArray[np.uint64] | None = None
    done: int = 0
    """A bit for each layer group that is gathered, or placed. Changed by `Request.done_with`."""
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
    """Retrieve: why the object that came cannot be used."""

    @property
    def key(self) -> bytes:
        return self.links[-LINK:]

    @property
    def wanted(self) -> int:
        """Retrieve: tokens of it that will be placed, from its start."""
        return self.source.tokens if self.source is not None else 0

    @property
    def excerpt(self) -> Excerpt | None:
        """Retrieve: where it was captured, when that was elsewhere."""
        return self.source.excerpt if self.source is not None else None

    def leases(self) -> list[Lease]:
        """All that holds it, in whatever form: what a call on it may touch."""
        encoded = tuple(self.encoded.values())  # a copy: another branch may add its own meanwhile
        forms = (self.object, self.head, self.plain, *[e.object for e in encoded])
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
