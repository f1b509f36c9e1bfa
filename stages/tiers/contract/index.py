"""The index of a local tier: what is stored, where, and what is evicted first.

Every inner grain link of an object is an alias of it, so that a prompt which leaves the object's
text half way still finds the part they share. One lock guards changes; `find` takes none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Generic, Protocol, TypeVar

from tierloom.stages.kv.object import LINK
from tierloom.stages.kv.text import Text
from tierloom.stages.options import Seconds, Size
from tierloom.stages.tiers.contract.eviction import POLICIES, PolicyName
from tierloom.stages.tiers.contract.tier import Found, TierWatch

P = TypeVar("P")
FOREVER = float("inf")


class LifeWatch(Protocol):
    """Told what becomes of a tier's objects, under the lock of its index."""

    def came(self, key: bytes) -> None: ...

    def used(self, keys: Sequence[bytes]) -> None: ...

    def evicted(self, key: bytes) -> None: ...

    def went(self, key: bytes) -> None:
        """For another reason than to make room."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexOptions:
    """Options of every tier with an index."""

    capacity: Size
    """Most bytes to store."""
    evict: PolicyName = "lru"
    """Eviction policy: which objects are evicted first when room is needed."""
    ttl: Seconds = 0.0
    """How long an object lives, also across a restart; 0: until it is evicted."""

    def __post_init__(self) -> None:
        if self.capacity <= 0:
            raise ValueError(f"capacity must be positive, got {self.capacity}")
        if self.evict not in POLICIES:
            raise ValueError(f"evict is {self.evict!r}; known: {', '.join(POLICIES)}")
        if self.ttl < 0:
            raise ValueError(f"ttl must not be negative, got {self.ttl}")


@dataclass(slots=True)
class Entry(Generic[P]):
    """One kept object."""

    key: bytes
    links: bytes
    """Its grain links, 32 bytes each; the last is the key."""
    nbytes: int
    place: P
    """Where it is in the tier."""
    expires: float
    """In the clock of the index; see `Index.expiry`."""
    pinned: bool = False
    leased: bool = False
    """Protected from eviction for a while: nothing of it is written down."""
    came: float = 0.0
    """When this process had it first, in the clock of the index."""


def split(links: bytes) -> list[bytes]:
    return [links[i : i + LINK] for i in range(0, len(links), LINK)]


class Index(Generic[P]):
    """Entries by key and by inner link, in the order in which they came."""

    def __init__(
        self,
        policy: PolicyName,
        capacity: int,
        *,
        ttl: float,
        clock: Callable[[], float],
        in_use: Callable[[P], bool],
        watch: TierWatch | None = None,
    ) -> None:
        """`ttl`: seconds an entry lives, 0: no limit. `in_use`: must not be evicted now.
        `watch`: told of each entry that comes or goes."""
        self.lock = threading.RLock()
        """Held by every change; take it to make several of them one."""
        self.nbytes = 0
        self._policy = POLICIES[policy](capacity)
        self._ttl, self._clock, self._in_use = ttl, clock, in_use
        self._watch = watch
        self.lives: LifeWatch | None = None
        """None: nobody asks."""
        self._entries: OrderedDict[bytes, Entry[P]] = OrderedDict()
        self._aliases: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Entry[P]]:
        return iter(self._entries.values())

    def get(self, key: bytes) -> Entry[P] | None:
        """The entry of exactly this key, unless its time is over. Changes nothing; no lock."""
        entry = self._entries.get(key)
        if entry is None or entry.expires <= self._clock():
            return None
        return entry

    def expired_entry(self, key: bytes) -> Entry[P] | None:
        """The entry of this key whose time is over, and that was not removed yet."""
        return self._entries.get(key) if self.get(key) is None else None

    def find(self, links: bytes) -> Found | None:
        """The object that serves most grains of the chunk with these links; a key alone asks for
        its object, wherever that begins. As `get`."""
        whole = self.get(links[-LINK:])
        if whole is not None and (whole.links == links or whole.key == links):
            return Found(whole.key, len(links) // LINK, whole.nbytes)
        asked = split(links)
        for grains in range(len(asked), 0, -1):
            link = asked[grains - 1]
            entry = self.get(link) or self.get(self._aliases.get(link, b""))
            # An object that begins elsewhere in the text has the link at another position.
            if entry is not None and entry.links.startswith(links[: grains * LINK]):
                return Found(entry.key, grains, entry.nbytes)
        return None

    def expiry(self) -> float:
        """When an entry that comes now is to go."""
        return self._clock() + self._ttl if self._ttl else FOREVER

    def expect(self, key: bytes, nbytes: int) -> None:
        """A new object is about to come, perhaps after `evict` has made room for it."""
        with self.lock:
            self._policy.expect(key, nbytes)

    def add(self, entry: Entry[P], text: Text | None = None) -> None:
        """Show an entry whose key is not here. `text`: what its header has, for who watches."""
        entry.came = self._clock()
        with self.lock:
            self._entries[entry.key] = entry
            for link in split(entry.links)[:-1]:
                self._aliases[link] = entry.key
            self.nbytes += entry.nbytes
            if not entry.pinned:
                self._policy.add(entry.key, entry.nbytes)
            if self._watch is not None:
                self._watch(True, entry.links, text)
            if self.lives is not None:
                self.lives.came(entry.key)

    def remove(self, entry: Entry[P]) -> bool:
        """Remove an entry; False if it (not only its key) was gone before."""
        with self.lock:
            if self._entries.get(entry.key) is not entry:
                return False
            self._policy.remove(entry.key)
            self._forget(entry)
            if self.lives is not None:
                self.lives.went(entry.key)
            return True

    def evict(self, incoming: bytes = b"") -> Entry[P] | None:
        """Remove the entry that should go first; None if all are pinned or in use."""
        with self.lock:
            key = self._policy.victim(self._skip, incoming)
            if key is None:
                return None
            entry = self._entries[key]
            self._forget(entry)
            if self.lives is not None:
                self.lives.evicted(key)
            return entry

    def expired(self) -> list[Entry[P]]:
        """Entries whose time is over, pinned ones too, the oldest first. Changes nothing."""
        now = self._clock()
        with self.lock:
            return list(takewhile(lambda entry: entry.expires <= now, self))

    def touch(self, keys: Sequence[bytes]) -> None:
        """Used again, head of the prompt first: the tail is marked and evicted first."""
        with self.lock:
            for key in reversed(keys):
                self._policy.touch(key)
            if self.lives is not None:
                self.lives.used(keys)

    def order_for_eviction(self, keys: Sequence[bytes]) -> None:
        """Put together, head of the prompt first: without its head the tail is useless."""
        with self.lock:
            for key in reversed(keys):
                self._policy.order_for_eviction(key)

    def pin(self, key: bytes, *, pinned: bool, lease: bool = False) -> bool:
        """Protect an entry from eviction, or make it evictable, as if new, unless it is protected
        in the other way as well; False if absent. `lease`: for a while."""
        with self.lock:
            entry = self.get(key)
            if entry is None:
                return False
            was = entry.pinned or entry.leased
            if lease:
                entry.leased = pinned
            else:
                entry.pinned = pinned
            now = entry.pinned or entry.leased
            if now and not was:
                self._policy.remove(key)
            elif was and not now:
                self._policy.add(key, entry.nbytes)
            return True

    def age(self, entry: Entry[P]) -> float:
        """Seconds since this process had an entry first."""
        return self._clock() - entry.came

    def _skip(self, key: bytes) -> bool:
        return self._in_use(self._entries[key].place)

    def _forget(self, entry: Entry[P]) -> None:
        del self._entries[entry.key]
        for link in split(entry.links)[:-1]:
            if self._aliases.get(link) == entry.key:
                del self._aliases[link]
        self.nbytes -= entry.nbytes
        if self._watch is not None:
            self._watch(False, entry.links)
