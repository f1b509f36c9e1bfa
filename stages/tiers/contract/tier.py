"""What a tier is: a place where whole objects are kept.

Batch forms only. A tier never shows an object before its last byte is there, never returns bytes
whose header does not name the requested key, and never raises for a single bad object: that is a
`Lost`. It deletes an object that it read on proof of damage only (`Damaged`): what this reader
cannot read, others may. What it raises (TierDown, OSError, a timeout) is about the tier, and opens
its breaker. `tierloom.testing` turns each of these promises into a test.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from tierloom.stages.errors import BadObject, Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.kv.text import Text
from tierloom.stages.memory.arena import Arena
from tierloom.stages.renamed import bridge_renamed

if TYPE_CHECKING:
    from tierloom.stages.tiers.contract.index import Entry, LifeWatch


class TierWatch(Protocol):
    """Told of each object that comes to a local tier (`kept`), or goes."""

    def __call__(self, kept: bool, links: bytes, text: Text | None = None) -> None:
        """`links`: its grain links, the last is its key. `text`: of one that comes, where its
        header has it and the tier has read that."""


class Found(NamedTuple):
    """An object that serves the beginning of a chunk, and how many of the chunk's grains."""

    key: bytes
    grains: int
    nbytes: int


@dataclass(slots=True)
class Read:
    """A request for an object, or for its first frames. Filled in by the tier.

    Frames are wanted from the first not yet loaded up to `upto`. The first read of an object makes
    `object` (its lease then belongs to the reader, who releases it, also when the call raised);
    later ones go on with it.
    """

    key: bytes
    upto: int
    """Read frames up to, not including, this one; a large number means all."""
    object: Object | None = None
    lost: Lost | None = None
    why: BadObject | None = None
    """What is wrong with the stored object, if the tier can say."""

    def refuse(self, error: BadObject) -> None:
        """The stored object is unusable. Damaged: the tier deletes it; otherwise it stays."""
        self.lost, self.why = error.lost, error


class Inner(NamedTuple):
    """A tier inside another: an option of this type is written as a tier is, or as a URL."""

    use: str
    cls: type[Tier]
    options: Any

    def build(self, ctx: TierContext) -> Tier:
        make: Any = self.cls  # every tier takes (options, context)
        tier: Tier = make(self.options, ctx)
        return tier


class TierStat(NamedTuple):
    """A tier's holdings."""

    objects: int
    nbytes: int
    capacity: int
    """0: unbounded, or unknown."""


class HoldingsCount:
    """What this process has put into a store that others use too, less what it deleted."""

    def __init__(self, capacity: int = 0) -> None:
        self._lock = threading.Lock()
        self.stat = TierStat(0, 0, capacity)

    def add(self, objects: int, nbytes: int) -> None:
        """From any thread; negative numbers for what was deleted."""
        with self._lock:
            was = self.stat
            objects, nbytes = max(0, was.objects + objects), max(0, was.nbytes + nbytes)
            self.stat = TierStat(objects, nbytes, was.capacity)

    def reset(self, objects: int = 0, nbytes: int = 0) -> None:
        """Replace the counts by what was found."""
        with self._lock:
            self.stat = TierStat(objects, nbytes, self.stat.capacity)


def require_sealed(*objects: Object) -> None:
    """Raise ValueError where one is not whole: it must not be put."""
    if not all(obj.sealed for obj in objects):
        raise ValueError("an object must be sealed before it is put")


class TierContext(NamedTuple):
    """What a tier is given to work with."""

    arena: Arena
    namespace: bytes
    """The digest every object of this pipeline must carry; empty: any (tools that inspect)."""
    pool: Callable[..., Awaitable[Any]]
    """`await pool(fn, *args, leases=...)` runs a blocking call that frees the GIL. A
    cancelled caller does not end it: `leases` are all whose memory it touches, held until then."""
    watch: TierWatch | None = None
    """Told of each object of a local tier that comes or goes."""
    epoch: bytes = b""
    """By which this pipeline's own listener greets, if it has one."""
    given_up: list[Callable[[Object], None]] | None = None
    """Called by memory tiers, on the loop, with each object that makes room for one that is put:
    who wants to have it retains its lease. Nobody else has it then. They must return at once."""


@dataclass(slots=True)
class TierCounts:
    """Counters for `stats()`; changed on the loop."""

    hits: int = 0
    misses: int = 0
    puts: int = 0
    evicted: int = 0
    refused: int = 0
    corrupt: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    extra: dict[str, int] = field(default_factory=dict)


class Tier(ABC):
    """Subclasses are built from their options and a context, then opened once."""

    local: bool = False
    """It has an index in this process, so `find` answers at once and knows inner links."""
    memory_options: ClassVar[tuple[str, ...]] = ()
    """Options that say how much of the host's memory it takes beside the arena."""
    in_arena: bool = False
    """Its objects stay in the arena, to which its capacity is added; others can promote to it."""
    read_only: bool = False
    """Nothing can be put into it: it is others' to keep."""
    one_by_one: bool = False
    """Its store is asked for each key by itself: how much of a prompt it has is searched."""

    renamed: ClassVar[Mapping[str, str]] = {
        "has": "exists",
        "drop": "delete",
        "settle": "order_for_eviction",
    }
    """New method names by old ones, which still work in this release."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bridge_renamed(cls, cls.renamed)

    def __init__(self, ctx: TierContext) -> None:
        self.ctx = ctx
        self.counts = TierCounts()

    @property
    def address(self) -> str:
        """Where it is, for the log; secrets are masked by who prints it. Empty: in this process."""
        options = getattr(self, "options", None)
        return str(getattr(options, "url", "") or getattr(options, "path", "") or "")

    async def open(self) -> None:  # noqa: B027 (nothing to do is fine)
        """Connect, or read the index. Raises ConfigError or TierDown."""

    async def close(self) -> None:  # noqa: B027
        """Release everything. Called once, also after a failed `open`."""

    def find(self, links: bytes) -> Found | None:
        """The object that serves most of a chunk whose grain links these are (local tiers only).

        Changes nothing and does no I/O; may be called from any thread.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no index in this process")

    def hold(self, key: bytes) -> Object | None:
        """An object that lies in the arena, its lease retained for the caller, who releases it;
        None where it must be read. No I/O; any thread."""
        return None

    def touch(self, keys: Sequence[bytes]) -> None:  # noqa: B027
        """These objects, head of the prompt first, were used: the tail is evicted first."""

    def order_for_eviction(self, keys: Sequence[bytes]) -> None:  # noqa: B027
        """These objects, head of the prompt first, were put for one request, in several calls: the
        tail is evicted first. Does not count as a use."""

    def follow(self, lives: LifeWatch) -> None:  # noqa: B027
        """From now on `lives` is told what becomes of its objects (of tiers with an index)."""

    @abstractmethod
    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of these keys have a whole object."""

    async def prefix_length(self, keys: Sequence[bytes]) -> int:
        """How many chunks of a prompt, head first, it probably has from the first one on. One that
        is asked one by one may ask for some of them: the reads show what is missing in between."""
        found = await self.exists(keys)
        return next((i for i, there in enumerate(found) if not there), len(found))

    @abstractmethod
    async def read(self, reads: Sequence[Read]) -> None:
        """Load what is requested, in order of (frame, object). Sets `object` or `lost` on each."""

    @abstractmethod
    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        """Store sealed objects; None for each that is stored (or was already). A tier that keeps a
        lease retains it."""

    @abstractmethod
    async def delete(self, keys: Sequence[bytes]) -> int:
        """Delete objects; returns how many existed."""

    @abstractmethod
    async def clear(self) -> int:
        """Delete all objects of this pipeline's namespace; returns how many existed."""

    @abstractmethod
    def stat(self) -> TierStat: ...

    def pin(self, keys: Sequence[bytes], *, pinned: bool = True) -> int:
        """Protect objects from eviction, or stop that; how many were found (local tiers only)."""
        raise NotImplementedError(f"{type(self).__name__} cannot pin")

    def lease(self, keys: Sequence[bytes], *, leased: bool = True) -> int:
        """As `pin`, apart from it, and until this process ends at most."""
        raise NotImplementedError(f"{type(self).__name__} cannot pin")

    def entries(self) -> list[Entry[Any]]:
        """What the index of a local tier has, in the order in which it came; any thread."""
        return []

    def age(self, entry: Entry[Any]) -> float:
        """Seconds since this process had one of `entries` first."""
        return 0.0


class SharedTier(Tier):
    """A tier over a store that others use too."""

    def __init__(self, ctx: TierContext) -> None:
        super().__init__(ctx)
        self._holdings = HoldingsCount()

    def stat(self) -> TierStat:
        """What this process put and did not delete; it does not know what others did."""
        return self._holdings.stat
