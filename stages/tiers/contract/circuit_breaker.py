"""CircuitBreaker: a tier whose failures are data, and which is not called while it fails.

Wraps every tier. Each call has a time limit. Reads and puts fail apart (`direction.py`): what a
tier has is served though nothing more can be put, and nothing is put where nothing can be read. A
tier may still answer `exists` while it cannot deliver objects, so after a failed read only a
successful read closes that direction. Reads are timed, so that a plan can estimate what a load will
cost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from typing import TypeVar

import anyio

from tierloom.stages.errors import BadObject, ConfigError, Damaged, Lost
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.options import masked
from tierloom.stages.tiers.contract.client_errors import is_failure
from tierloom.stages.tiers.contract.direction import Direction, Limits, cause, why_refused
from tierloom.stages.tiers.contract.object_reader import is_still
from tierloom.stages.tiers.contract.read_cost import ReadCostModel
from tierloom.stages.tiers.contract.tier import Read, Tier
from tierloom.stages.tiers.contract.unreadable import UnreadableObjects
from tierloom.stages.tiers.contract.wrapper import WrapperTier

log = logging.getLogger(__name__)

T = TypeVar("T")

_CANCEL_FRACTION = 4
"""A call that is cancelled after 1/4 of the call's time limit counts as failed."""
_STALE = 60.0
"""Seconds after which a measured read cost expires."""
_PATIENCE = 10  # opening and closing may take this many times the limit of a call


class CircuitBreaker(WrapperTier):
    """Raises only ConfigError at the first `open`; cancellation passes through."""

    def __init__(
        self, tier: Tier, name: str, limits: Limits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`name`: for the log. `clock`: monotonic."""
        super().__init__(tier)
        self.name = name
        self.reads = ReadCostModel()
        self._limits, self._clock = limits, clock
        address = masked(tier.address)
        told = f"{name} ({address})" if address else name
        self.reading = Direction("reads", told, limits, clock)
        self.writing = Direction("puts", told, limits, clock)
        self._told = told
        self._opened = self._told_too_small = False
        self._read_at = 0.0
        self.share = 1.0
        """Encoded bytes read per byte of plain KV; of progressive objects: of the first scan."""
        self.timed: Callable[[str, int, float], None] | None = None
        """Told of calls that moved objects: reads or puts, their bytes, seconds. None: nobody
        asks."""
        self.unread = UnreadableObjects(name, self.counts, clock)
        """Objects that exist, but cannot be read here."""
        self.frozen = self.bypassed = False
        """Somebody wants nothing to be put; and nothing to be read either."""

    @property
    def available(self) -> bool:
        """A read would be let through: its breaker is closed, or a probe is due."""
        return self.reading.open_to_calls and not self.bypassed

    @property
    def takes(self) -> bool:
        """A put would be let through. Where reads fail it is one of the probes: what it puts is
        read back."""
        if self.frozen or self.bypassed:
            return False
        return self.writing.open_to_calls and (self.reading.open_to_calls or not self._opened)

    @property
    def refusal(self) -> Lost | None:
        """Why nothing is put now, though the tier works."""
        return Lost.REFUSED if self.frozen or self.bypassed else self.writing.refusal

    def cost(self, nbytes: int) -> float | None:
        """Seconds that reading `nbytes` of plain KV should take, encoded as this tier has it; None
        before the first read, and if the last one is too long ago."""
        if self._clock() - self._read_at > _STALE:
            return None
        return self.reads.of(round(nbytes * self.share))

    def figures(self) -> dict[str, float | str]:
        """Counters and holdings as plain numbers; times in seconds since the epoch, 0: it works."""
        counts = asdict(replace(self.counts, extra=dict(self.counts.extra)))  # from any thread
        counts |= counts.pop("extra") | self.stat()._asdict()
        return counts | {
            "available": self.reading.closed,
            "reads_down_since": self.reading.down_since,
            "writes_down_since": self.writing.down_since,
            "last_error": self.reading.last_error or self.writing.last_error,
            "latency": self.reads.latency,
            "bandwidth": self.reads.bandwidth,
        }

    async def open(self) -> None:
        """Raises ConfigError; a tier that is down is opened later, by a probe."""
        try:
            await self._within(_PATIENCE * self._limits.timeout, self._open)
        except ConfigError as error:
            raise ConfigError(masked(str(error))) from None  # clients' errors may name their URL
        except BaseException as error:
            if not is_failure(error):
                raise
            self.trip(error)

    async def close(self) -> None:
        try:
            await self._within(_PATIENCE * self._limits.timeout, self.tier.close)
        except BaseException as error:
            if not is_failure(error):
                raise
            log.warning("tier %s did not close: %s", self._told, cause(error))

    def trip(self, error: BaseException) -> None:
        """Leave it alone for a while: nothing of it works."""
        self.reading.trip(error, "is down", "is back")
        self.writing.trip(error)

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        if self.bypassed:
            return [False] * len(keys)
        found = await self._call(self.reading, lambda: self.tier.exists(keys))
        return [False] * len(keys) if isinstance(found, Lost) else found

    async def prefix_length(self, keys: Sequence[bytes]) -> int:
        """As the tier says; what did not come lately is asked for by itself."""

        async def search() -> int:
            doubted = self.unread.doubted(keys)
            there = await self.tier.exists([keys[i] for i in doubted]) if doubted else []
            gone = (i for i, kept in zip(doubted, there, strict=True) if not kept)
            return await self.tier.prefix_length(keys[: next(gone, len(keys))])

        found = await self._call(self.reading, search)
        return 0 if isinstance(found, Lost) else found

    async def read(self, reads: Sequence[Read]) -> None:
        fresh = [read for read in reads if read.object is None]
        before = sum(r.object.arrived for r in reads if r.object)
        began = self._clock()
        failed: Lost | None = Lost.TIER_DOWN
        if not self.bypassed:
            failed = await self._call(self.reading, lambda: self.tier.read(reads), cargo=True)
        if failed is None:
            nbytes = sum(r.object.arrived for r in reads if r.object) - before
            if nbytes:
                self._read_at = self._clock()
                self.reads.add(nbytes, self._read_at - began)
                if self.timed is not None:
                    self.timed("reads", nbytes, self._read_at - began)
            for read in reads:
                if isinstance(read.why, Damaged):
                    self._say(read.key, read.why)
                elif read.lost is Lost.ABSENT and self.one_by_one:
                    self.unread.doubt(read.key)
                elif read.lost is not None and read.lost.unreadable:
                    self.unread.note(read.key, read.lost, read.why)
            for read in fresh:
                if read.object is not None and read.object.loaded:
                    self.share += (_share(read.object) - self.share) / min(10, self.reads.reads)
            return
        for read in reads:
            read.lost = failed
        for read in fresh:
            if read.object is not None:
                read.object.lease.release()
                read.object = None

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        if not self.takes:
            return [self.refusal or Lost.TIER_DOWN] * len(objects)
        timed = self.timed
        began = self._clock() if timed is not None else 0.0
        reads_fail = self._opened and not self.reading.closed
        self.reading.probing |= reads_fail
        try:
            lost = await self._call(self.writing, lambda: self.tier.put(objects), cargo=True)
        finally:
            if reads_fail:
                self.reading.probing = False
        if isinstance(lost, Lost):
            return [lost] * len(objects)
        self._say_what_never_fits(objects, lost)
        put = [obj.header for obj, why in zip(objects, lost, strict=True) if why is None]
        if timed is not None and put:
            timed("puts", sum(header.nbytes for header in put), self._clock() - began)
        if reads_fail and put:
            await self._call(
                self.reading, lambda: is_still(self.tier, put[0].key, put[0]), cargo=True
            )
        self.unread.forget([obj.header.key for obj in objects])
        return lost

    async def refused(self, key: bytes, error: BadObject, read: Header) -> None:
        """An object that was read turned out to be unusable: delete it if it is damaged, else keep
        it. Readers delete objects of a tier in no other way. `read`: its header."""
        if isinstance(error, Damaged):
            await self.expel(key, error, read)
        else:
            self.unread.note(key, error.lost, error)

    async def expel(self, key: bytes, proof: Damaged, read: Header) -> None:
        """Delete an object on proof of damage, unless another has replaced it: then frames of that
        one may have been read after the header of this one."""
        self.counts.corrupt += 1
        if await self._call(self.reading, lambda: is_still(self.tier, key, read)) is True:
            self._say(key, proof)
            await self.delete([key])

    def _say(self, key: bytes, proof: Damaged) -> None:
        log.warning("tier %s deletes damaged object %s: %s", self.name, key.hex()[:16], proof)

    async def delete(self, keys: Sequence[bytes]) -> int:
        self.unread.forget(keys)
        dropped = await self._call(self.writing, lambda: self.tier.delete(keys))
        return 0 if isinstance(dropped, Lost) else self._made_room(dropped)

    async def clear(self) -> int | Lost:
        """How many objects were deleted, or why it failed."""
        cleared = await self._call(self.writing, self.tier.clear)
        return cleared if isinstance(cleared, Lost) else self._made_room(cleared)

    def _made_room(self, objects: int) -> int:
        if objects:
            self.writing.retry()
        return objects

    async def _call(
        self, way: Direction, work: Callable[[], Awaitable[T]], *, cargo: bool = False
    ) -> T | Lost:
        """The tier's answer; else LATE, TIER_DOWN, or why it takes nothing. `cargo`: the call
        transfers objects."""
        if not way.open_to_calls and (cargo or way.refusal is None):
            return way.refusal or Lost.TIER_DOWN
        probing = not way.closed and (cargo or way.refusal is None)
        way.probing = way.probing or probing
        began = self._clock()
        try:
            if not self._opened:
                await self._within(_PATIENCE * self._limits.timeout, self._open)
            result = await self._within(self._limits.timeout, work)
        except BaseException as error:
            if not is_failure(error):
                waited = self._clock() - began
                # A request's deadline is often shorter than the limit of a call.
                if waited >= self._limits.timeout / _CANCEL_FRACTION:
                    late = TimeoutError(f"cancelled after {waited:.3g} s")
                    way.failed(late, cargo=cargo, quiet=self._quiet(way))
                raise
            why = why_refused(error) if way is self.writing and self._opened else None
            if why is not None:
                way.refused(why, error)
                return why
            if self._opened:
                way.failed(error, cargo=cargo, quiet=self._quiet(way))
            else:
                self.trip(error)
            return Lost.LATE if isinstance(error, TimeoutError) else Lost.TIER_DOWN
        else:
            way.succeeded(cargo=cargo)
            return result
        finally:
            if probing:
                way.probing = False

    def _quiet(self, way: Direction) -> bool:
        """Nothing is said of puts that fail where nothing can be read either."""
        return way is self.writing and not self.reading.closed

    def _say_what_never_fits(self, objects: Sequence[Object], lost: Sequence[Lost | None]) -> None:
        if self._told_too_small or Lost.NO_ROOM not in lost:
            return
        capacity, nbytes = self.stat().capacity, max(obj.header.nbytes for obj in objects)
        if not 0 < capacity < nbytes:
            return
        self._told_too_small = True
        log.warning(
            "tier %s cannot keep an object of %d bytes: its capacity is %d bytes; raise it, and "
            "write it with a unit, as 8 GiB",
            *(self._told, nbytes, capacity),
        )

    async def _open(self) -> None:
        await self.tier.open()
        self._opened = True
        self.reading.succeeded(cargo=True)  # what failed was to open it
        self.writing.succeeded(cargo=True)

    async def _within(self, seconds: float, work: Callable[[], Awaitable[T]]) -> T:
        with anyio.fail_after(seconds):
            return await work()


def _share(object: Object) -> float:
    """Encoded bytes that have come, per byte of plain KV."""
    header = object.header
    groups = min(object.loaded, header.groups)
    return object.arrived / sum(f.raw for f in header.frames[:groups])
