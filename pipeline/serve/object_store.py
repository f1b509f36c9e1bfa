"""ObjectStore: the tiers of a file without its graphs: whole objects in, whole objects out.

What `tierloom serve` keeps for many engines. Objects of all namespaces are stored together, each
under a name made of its namespace and key, so that nobody can reach another's by the key alone. The
first tier of the file is asked first; what a colder one delivers is promoted to it, where it is
memory, and what it took is written to the others in the background.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.pipeline.run.threads import Pool
from tierloom.pipeline.run.tier_stack import open_tiers
from tierloom.stages.directory.chunk_directory import ChunkDirectory
from tierloom.stages.errors import ArenaFull, Lost
from tierloom.stages.kv.object import LINK, Object, name_of
from tierloom.stages.kv.text import Text
from tierloom.stages.memory.arena import Arena, Lease
from tierloom.stages.ops.in_turns import mark_in_turns
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import Read, TierStat

if TYPE_CHECKING:
    from tierloom.pipeline.run.measures import Measures

log = logging.getLogger("tierloom.serve")

_AT_ONCE = 8
_WHOLE = 1 << 30
_LIKELY = 64 << 20
"""Most bytes assumed for an object of which nothing is known."""
_PATIENCE = 2.0
"""Seconds to wait for room."""


class ObjectDirectory:
    """Which objects of which namespace are in tiers with an index; thread-safe."""

    def __init__(self, tiers: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._empty = ChunkDirectory(tiers)
        self._spaces: dict[bytes, ChunkDirectory] = defaultdict(partial(ChunkDirectory, tiers))

    def note(self, tier: str, nbytes: int, kept: bool, links: bytes) -> None:
        """An object came to a tier, or went."""
        space, name = links[:LINK], links[-LINK:]
        with self._lock:
            objects = self._spaces[space]
            objects.note(0, tier, kept, name, nbytes)
            if not len(objects):
                del self._spaces[space]

    def names(self, space: bytes) -> list[bytes]:
        with self._lock:
            return self._spaces.get(space, self._empty).keys()

    def count(self, space: bytes) -> tuple[int, int]:
        """Objects and bytes of a namespace."""
        with self._lock:
            objects = self._spaces.get(space, self._empty)
            return len(objects), objects.nbytes


class MemoryReservation:
    """Memory that one exchange with a client holds, released all at once."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._promised = 0
        self._leases: list[Lease] = []

    async def promise(self, nbytes: int) -> bool:
        """Wait a moment until `nbytes` may be leased; False: no room. Call it once for all that is
        needed: two that each hold a part would wait for each other."""
        try:
            with anyio.fail_after(_PATIENCE):
                await self._arena.promises.reserve(nbytes)
        except (ArenaFull, TimeoutError):
            return False
        self._promised += nbytes
        return True

    def lease(self, nbytes: int) -> Lease:
        """Memory for an object that comes, of what was promised. Raises ArenaFull."""
        return self._arena.lease(nbytes)

    def take(self, lease: Lease) -> None:
        """A lease becomes ours to release."""
        self._leases.append(lease)

    def close(self) -> None:
        while self._leases:
            self._leases.pop().release()
        self._arena.promises.unreserve(self._promised)
        self._promised = 0

    def __enter__(self) -> MemoryReservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ObjectStore:
    """Everything runs on the loop that opened it."""

    writable, takes_offers = True, False

    def __init__(self, spec: PipelineSpec, *, shared: bool = False) -> None:
        """`shared`: the arena can be mapped by other processes."""
        self.spec = spec
        kept = sum(t.options.capacity for t in spec.tiers.values() if t.cls.in_arena)
        self.arena = Arena(spec.budget.arena, kept, shared=shared)
        self.kept_in_memory = kept
        self.largest = self.arena.working // 2
        """Most bytes of an object."""
        self.tiers: list[CircuitBreaker] = []
        self.dropped = 0
        """Objects not written to a colder tier because it was too slow."""
        self._directory = ObjectDirectory(list(spec.tiers))
        self._io = Pool(spec.budget.threads, "io")
        self._behind: dict[str, deque[Object]] = {}
        self._awake: dict[str, anyio.Event] = {}
        self._writing = 0
        """Bytes that wait for colder tiers; limited, as they cannot be evicted until then."""
        first = next(iter(spec.tiers.values()))
        memory = first.options.capacity if first.cls.in_arena else self.arena.working
        self._waits = min(self.arena.working // 2, memory // 4)
        self._home = AsyncExitStack()
        self._measures: Measures | None = None

    async def open(self) -> None:
        """Open the tiers. Raises ConfigError."""
        by_name: dict[str, CircuitBreaker] = {}

        def note(tier: str, kept: bool, links: bytes, text: Text | None = None) -> None:
            found = by_name[tier].find(links[-LINK:]) if kept else None
            self._directory.note(tier, found.nbytes if found is not None else 0, kept, links)

        await open_tiers(self.spec, self.arena, self._io, by_name, self._home, note=note)
        self.tiers = list(by_name.values())

    def start(self, tasks: anyio.abc.TaskGroup) -> None:
        """One task for each colder tier."""
        for tier in self.tiers[1:]:
            self._behind[tier.name] = deque()
            self._awake[tier.name] = anyio.Event()
            tasks.start_soon(self._write_behind, tier)

    async def settled(self) -> None:
        """Wait until all pending writes to colder tiers are done."""
        while self._writing:  # noqa: ASYNC110 - once, at the end
            await anyio.sleep(0.01)

    async def close(self) -> None:
        await self._home.aclose()
        self._io.close()
        self.arena.retire()

    def reservation(self) -> MemoryReservation:
        return MemoryReservation(self.arena)

    async def exists(self, space: bytes, keys: Sequence[bytes]) -> list[bool]:
        """Which exist in any tier. Those that do count as used."""
        names = [name_of(space, key) for key in keys]
        found = [False] * len(names)
        for tier in self.tiers:
            missing = [i for i, there in enumerate(found) if not there]
            if not missing or not tier.available:
                continue
            if tier.local:
                for i in missing:
                    found[i] = tier.find(names[i]) is not None
                await mark_in_turns(tier.touch, [names[i] for i in missing if found[i]])
            else:
                asked = await tier.exists([names[i] for i in missing])
                for i, there in zip(missing, asked, strict=True):
                    found[i] = there
        return found

    async def make_room(
        self, space: bytes, reservation: MemoryReservation, keys: Iterable[bytes]
    ) -> bool:
        """Promise the reservation what reading these may take; False: only memory is to be read."""
        need = sum(self._room(name_of(space, key)) for key in keys)
        return await reservation.promise(min(need, self.arena.working))

    def _room(self, name: bytes) -> int:
        """Bytes to be leased for an object: 0 where it is in memory, or nowhere."""
        for tier in self.tiers:
            if not tier.local:
                return min(self.largest, _LIKELY)
            found = tier.find(name)
            if found is not None:
                return 0 if tier.in_arena else found.nbytes
        return 0

    async def read(
        self, space: bytes, reservation: MemoryReservation, key: bytes, *, room: bool
    ) -> Object | Lost:
        """The whole object, whose lease the reservation releases. `room`: what `make_room` said.
        Never raises."""
        name, lost = name_of(space, key), Lost.ABSENT
        for tier in self.tiers:
            if not tier.available or (tier.local and tier.find(name) is None):
                continue
            if not room and not tier.in_arena:
                lost = Lost.NO_ROOM
                continue
            read = Read(name, _WHOLE)
            try:
                await tier.read([read])
            finally:
                if read.object is not None:
                    reservation.take(read.object.lease)
            obj = read.object
            if obj is None:
                lost = read.lost if read.lost not in (None, Lost.ABSENT) else lost
                continue
            if obj.header.namespace != space:  # a name says more than this could
                return Lost.FOREIGN
            if tier is not self.tiers[0] and self.tiers[0].in_arena:
                await self.tiers[0].put([_named(obj, space, name)])
            return obj
        return lost

    async def put(self, space: bytes, obj: Object) -> Lost | None:
        """Keep a sealed object, whose header was checked. Never raises."""
        named = _named(obj, space, name_of(space, obj.header.key))
        lost: Lost | None = Lost.TIER_DOWN
        for i, tier in enumerate(self.tiers):
            (lost,) = await tier.put([named])
            if lost is None:
                for colder in self.tiers[i + 1 :]:
                    self._pass_on(colder, named)
                return None
        return lost

    def stats(self) -> dict[str, Any]:
        """Counters of tiers and arena, as `Pipeline.stats`; and objects that were not written to a
        colder tier, and bytes that are still to be."""
        return {
            "stages": {}, "graphs": {}, "tiers": {t.name: t.figures() for t in self.tiers},
            "arena": self.arena.figures(), "off": None,
            "store": {"writing": self._writing, "dropped": self.dropped},
            **({"measured": self._measures.read()} if self._measures is not None else {}),
        }  # fmt: skip

    def measure(self) -> None:
        """As `Pipeline.measure`. Once it is open."""
        if self._measures is None:
            from tierloom.pipeline.run.measures import Measures

            self._measures = Measures({tier.name: tier for tier in self.tiers})

    async def order_for_eviction(self, space: bytes, keys: Iterable[bytes]) -> None:
        """These, head of the prompt first, came together: the tail is evicted first."""
        names = [name_of(space, key) for key in keys]
        for tier in self.tiers:
            await mark_in_turns(tier.order_for_eviction, names)

    async def delete(self, space: bytes, keys: Iterable[bytes]) -> int:
        """Delete objects; returns how many existed."""
        return await self._drop([name_of(space, key) for key in keys])

    async def clear(self, space: bytes) -> int:
        """Delete all objects of a namespace in tiers with an index."""
        return await self._drop(self._directory.names(space))

    def stat(self, space: bytes) -> TierStat:
        """What is stored of a namespace, in tiers with an index."""
        capacities = [t.stat().capacity for t in self.tiers]
        return TierStat(*self._directory.count(space), 0 if 0 in capacities else max(capacities))

    @property
    def evicted(self) -> int:
        return sum(tier.counts.evicted for tier in self.tiers)

    async def _drop(self, names: list[bytes]) -> int:
        dropped = 0
        for begin in range(0, len(names), 256):
            part = names[begin : begin + 256]
            dropped += max([await tier.delete(part) for tier in self.tiers], default=0)
        return dropped

    def _pass_on(self, tier: CircuitBreaker, obj: Object) -> None:
        waiting = self._behind[tier.name]
        if self._writing and self._writing + obj.lease.nbytes > self._waits:
            if not self.dropped:
                log.warning("tier %s is too slow: some objects are not written to it", tier.name)
            self.dropped += 1
            return
        obj.lease.retain()
        self._writing += obj.lease.nbytes
        waiting.append(obj)
        self._awake[tier.name].set()

    async def _write_behind(self, tier: CircuitBreaker) -> None:
        """Write pending objects to a tier, a few at a time."""
        waiting = self._behind[tier.name]
        while True:
            if not waiting:
                self._awake[tier.name] = anyio.Event()
                await self._awake[tier.name].wait()
            batch = [waiting.popleft() for _ in range(min(_AT_ONCE, len(waiting)))]
            try:
                await tier.put(batch)
            finally:
                for obj in batch:
                    self._writing -= obj.lease.nbytes
                    obj.lease.release()


def _named(obj: Object, space: bytes, name: bytes) -> Object:
    """The same bytes under the name that the tiers know them by. The links before it name the
    namespace, for the catalog; they are as many as before, as a header's length goes by them."""
    before = max(1, len(obj.header.links) // LINK - 1)
    header = obj.header._replace(key=name, links=space * before + name)
    return Object(header, obj.lease, loaded=obj.loaded, sealed=True)
