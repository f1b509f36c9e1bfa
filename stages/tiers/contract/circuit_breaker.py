"""CircuitBreaker: a tier whose failures are data, and which is left alone while it fails.

Wraps every tier. Each call has a time limit; `fails` failures in a row open the breaker, and from
then on nothing waits for the tier, but for one call every `probe` seconds. The first that succeeds
closes it. But who still answers whether an object is there may be unable to give it: after a read
or a put that failed, only a read or a put makes good. Reads are timed as they pass, so that a plan
can say what a load will cost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from traceback import format_exception
from typing import Protocol, TypeVar

import anyio

from tierloom.stages.errors import BadObject, ConfigError, Damaged, Lost, TierDown
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.options import masked
from tierloom.stages.tiers.contract.object_reader import is_still
from tierloom.stages.tiers.contract.read_cost import ReadCostModel
from tierloom.stages.tiers.contract.tier import Read, Tier
from tierloom.stages.tiers.contract.unreadable import UnreadableObjects
from tierloom.stages.tiers.contract.wrapper import WrapperTier

log = logging.getLogger(__name__)

T = TypeVar("T")

_IN_VAIN = 4
"""A call that its caller gives up counts as failed behind this part of the limit of a call."""
_STALE = 60.0
"""Seconds after which what reads have cost may be so no more."""
_PATIENCE = 10  # opening and closing may take so many times the limit of a call


class Limits(Protocol):
    """When a tier is given up."""

    @property
    def timeout(self) -> float:
        """Seconds one call may take."""

    @property
    def fails(self) -> int:
        """Failures in a row that open the breaker."""

    @property
    def probe(self) -> float:
        """Seconds an open breaker waits before it lets one call through."""


class CircuitBreaker(WrapperTier):
    """Never raises but ConfigError at the first `open`; a caller's cancellation passes through."""

    def __init__(
        self,
        tier: Tier,
        name: str,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is what the log calls it. `clock` must not go back."""
        super().__init__(tier)
        self.name = name
        self.reads = ReadCostModel()
        self._limits, self._clock = limits, clock
        self._opened = self._probing = self._puzzled = False
        self._cargo = False  # a call that carries objects failed, and none has succeeded since
        self._failures = 0
        self._retry = self._read_at = 0.0
        self.share = 1.0
        """Bytes read of objects per byte of their KV; progressive ones: of what is read first."""
        self.unread = UnreadableObjects(name, self.counts, clock)
        """Objects that are there, but not for this reader."""

    @property
    def available(self) -> bool:
        """A call would be let through: the breaker is closed, or a probe is due."""
        if self._failures < self._limits.fails:
            return True
        return not self._probing and self._clock() >= self._retry

    def cost(self, nbytes: int) -> float | None:
        """Seconds that reading so many bytes of plain KV should take, encoded as this tier has it;
        None before the first read, and when the last is long ago: it was slow, perhaps."""
        if self._clock() - self._read_at > _STALE:
            return None
        return self.reads.of(round(nbytes * self.share))

    def figures(self) -> dict[str, float]:
        """Counters and holdings as plain numbers."""
        counts = asdict(self.counts)
        counts |= counts.pop("extra") | self.stat()._asdict()
        return counts | {
            "available": self.available,
            "latency": self.reads.latency,
            "bandwidth": self.reads.bandwidth,
        }

    async def open(self) -> None:
        """Raises ConfigError; a tier that is down is opened later, by a probe."""
        try:
            await self._within(_PATIENCE * self._limits.timeout, self._open)
        except ConfigError as error:
            raise ConfigError(masked(str(error))) from None  # clients' errors may name their URL
        except Exception as error:
            self._failed(error)
            if self._failures < self._limits.fails:  # else that has said it
                log.warning("tier %s is down: %s", self.name, _cause(error))
            self._trip()

    async def close(self) -> None:
        try:
            await self._within(_PATIENCE * self._limits.timeout, self.tier.close)
        except Exception as error:
            log.warning("tier did not close", extra={"tier": self.name, "cause": _cause(error)})

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        found = await self._call(lambda: self.tier.exists(keys))
        return [False] * len(keys) if isinstance(found, Lost) else found

    async def read(self, reads: Sequence[Read]) -> None:
        fresh = [read for read in reads if read.object is None]
        before = sum(r.object.arrived for r in reads if r.object)
        began = self._clock()
        failed = await self._call(lambda: self.tier.read(reads), cargo=True)
        if failed is None:
            nbytes = sum(r.object.arrived for r in reads if r.object) - before
            if nbytes:
                self.reads.add(nbytes, self._clock() - began)
                self._read_at = self._clock()
            for read in reads:
                if isinstance(read.why, Damaged):
                    self._say(read.key, read.why)
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
        lost = await self._call(lambda: self.tier.put(objects), cargo=True)
        if isinstance(lost, Lost):
            return [lost] * len(objects)
        self.unread.forget([obj.header.key for obj in objects])
        return lost

    async def refused(self, key: bytes, error: BadObject, read: Header) -> None:
        """What a read brought turned out to be of no use: drop it if it is damaged, else keep it.
        The one way by which whoever reads drops an object of a tier. `read`: its header."""
        if isinstance(error, Damaged):
            await self.expel(key, error, read)
        else:
            self.unread.note(key, error.lost, error)

    async def expel(self, key: bytes, proof: Damaged, read: Header) -> None:
        """Drop an object on proof of damage, unless another is in its place by now: then frames of
        that one may have been read after the header of this one."""
        self.counts.corrupt += 1
        if await self._call(lambda: is_still(self.tier, key, read)) is True:
            self._say(key, proof)
            await self.delete([key])

    def _say(self, key: bytes, proof: Damaged) -> None:
        log.warning("tier %s dropped object %s: %s", self.name, key.hex()[:16], proof)

    async def delete(self, keys: Sequence[bytes]) -> int:
        self.unread.forget(keys)
        dropped = await self._call(lambda: self.tier.delete(keys))
        return 0 if isinstance(dropped, Lost) else dropped

    async def clear(self) -> int | Lost:
        """How many objects there were, or why it could not be done."""
        return await self._call(self.tier.clear)

    async def _call(self, work: Callable[[], Awaitable[T]], *, cargo: bool = False) -> T | Lost:
        """The tier's answer; LATE or TIER_DOWN when it has none. `cargo`: objects are carried."""
        if not self.available:
            return Lost.TIER_DOWN
        probing = self._failures >= self._limits.fails
        self._probing = self._probing or probing
        began = self._clock()
        try:
            if not self._opened:
                await self._within(_PATIENCE * self._limits.timeout, self._open)
            result = await self._within(self._limits.timeout, work)
        except Exception as error:
            self._failed(error, cargo)
            return Lost.LATE if isinstance(error, TimeoutError) else Lost.TIER_DOWN
        except anyio.get_cancelled_exc_class():
            waited = self._clock() - began
            if waited >= self._limits.timeout / _IN_VAIN:  # a request's deadline is often sooner
                self._failed(TimeoutError(f"given up after {waited:.3g} s"), cargo)
            raise
        else:
            if cargo or not self._cargo:
                if probing:
                    log.info("tier is back", extra={"tier": self.name})
                self._failures, self._cargo = 0, False
            return result
        finally:
            if probing:
                self._probing = False

    async def _open(self) -> None:
        await self.tier.open()
        self._opened = True

    async def _within(self, seconds: float, work: Callable[[], Awaitable[T]]) -> T:
        with anyio.fail_after(seconds):
            return await work()

    def _failed(self, error: Exception, cargo: bool = False) -> None:
        self._failures += 1
        self._cargo = self._cargo or cargo
        if not isinstance(error, (OSError, TierDown)) and not self._puzzled:
            self._puzzled = True
            trace = masked("".join(format_exception(error)))
            log.error("tier raised what it should not\n%s", trace, extra={"tier": self.name})
        if self._failures >= self._limits.fails:
            if self._failures == self._limits.fails:
                log.warning("tier is down", extra={"tier": self.name, "cause": _cause(error)})
            self._trip()

    def _trip(self) -> None:
        self._failures = max(self._failures, self._limits.fails)
        self._retry = self._clock() + self._limits.probe


def _cause(error: Exception) -> str:
    """For the log: a client's error may name its URL, password and all."""
    return masked(repr(error))


def _share(object: Object) -> float:
    """Bytes that have come, per byte of the KV that they stand for."""
    header = object.header
    groups = min(object.loaded, header.groups)
    return object.arrived / sum(f.raw for f in header.frames[:groups])
