"""Reading an object into a lease: the steps that are the same for every tier that loads objects.

    with ObjectReader(read, self.ctx.arena, self.counts) as reader:
        lease = reader.lease(nbytes)
        header = await self.ctx.pool(load, lease, leases=(lease,))
        reader.deliver(header, upto)

Inside, FileNotFoundError means that the object is absent, ArenaFull that there is no room for it,
and BadObject that it is unusable; each is reported in the read, and counted. Other errors are about
the tier, and are raised. A new lease that was not delivered is released, however it ended.
"""

from __future__ import annotations

from abc import abstractmethod
from types import TracebackType

from tierloom.stages.errors import ArenaFull, BadObject, Damaged, Lost
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.memory.arena import Arena, Lease
from tierloom.stages.tiers.contract.tier import Read, Tier, TierCounts


class ObjectReader:
    """One read under way. Owns the lease of a new object until it is delivered."""

    __slots__ = ("_arena", "_counts", "_lease", "held", "proof", "read", "seen")

    def __init__(self, read: Read, arena: Arena, counts: TierCounts) -> None:
        self.read, self.held = read, read.object
        self._arena, self._counts = arena, counts
        self._lease: Lease | None = None
        self.proof: Damaged | None = None
        """Why the object is to be deleted."""
        self.seen = b""
        """The first bytes of what is kept, as they were read: see `ReadingTier.expel`."""

    @property
    def loaded(self) -> int:
        """Frames that earlier reads have brought."""
        return self.held.loaded if self.held is not None else 0

    def lease(self, nbytes: int) -> Lease:
        """The memory to load into: that of the object at hand, or a lease of `nbytes` that the
        first call makes. Raises ArenaFull."""
        if self.held is not None:
            return self.held.lease
        return self._lease or self.own(self._arena.lease(nbytes))

    def own(self, lease: Lease) -> Lease:
        """Take over a lease for the object, to be released unless the object is delivered."""
        self._lease = lease
        return lease

    def deliver(self, header: Header, upto: int, *, source: object = None) -> None:
        """All frames up to `upto` are in the lease, and nothing writes into it any more."""
        held, boundaries = self.held, header.boundaries
        begin = boundaries[held.loaded] if held is not None else 0
        if held is None:
            assert self._lease is not None
            held = self.read.object = Object(header, self._lease, source=source)
            self._lease = None
            self._counts.hits += 1
        self._counts.bytes_out += max(0, boundaries[upto] - begin)
        held.loaded = max(held.loaded, upto)
        held.sealed = held.loaded == len(header.frames)

    def miss(self, cause: Lost = Lost.ABSENT) -> None:
        """The object does not come."""
        self.read.lost = cause
        self._counts.misses += cause is Lost.ABSENT
        self._counts.corrupt += cause is Lost.CORRUPT

    def refuse(self, error: BadObject) -> None:
        """The stored object is unusable. Damaged: the tier must delete it, otherwise it stays."""
        self.read.refuse(error)
        if isinstance(error, Damaged):
            self.proof = error
            self._counts.corrupt += 1

    def fail(self, cause: Lost | BadObject) -> None:
        if isinstance(cause, Lost):
            self.miss(cause)
        else:
            self.refuse(cause)

    def close(self) -> None:
        """Release a new lease that was not delivered."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def __enter__(self) -> ObjectReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:  # fmt: skip
        self.close()
        if isinstance(error, ArenaFull):
            self.miss(Lost.NO_ROOM)
        elif isinstance(error, FileNotFoundError):
            self.miss()
        elif isinstance(error, BadObject):
            self.refuse(error)
        else:
            return False
        return True


class ReadingTier(Tier):
    """A tier that finds damage when it reads, and recognizes an object by its first bytes only."""

    @abstractmethod
    async def _head(self, key: bytes, nbytes: int) -> bytes:
        """The first bytes of what is kept under a key. Raises FileNotFoundError."""

    async def expel(self, key: bytes, proof: Damaged, seen: bytes) -> None:
        """Delete an object on proof of damage, unless it begins otherwise than it did when it was
        read (`seen`): then another has been put in its place."""
        try:
            same = await self._head(key, len(seen)) == seen
        except FileNotFoundError:
            return
        if same:
            await self.delete([key])


async def is_still(tier: Tier, key: bytes, header: Header) -> bool:
    """Whether a tier still keeps the object of this header under `key`: another may have been put
    in its place since it was read."""
    read = Read(key, 0)
    await tier.read([read])
    if read.object is None:
        return False
    try:
        return read.object.header == header
    finally:
        read.object.lease.release()
