"""Holder: one engine that serves its tiers, and is left alone while it fails.

What fails once is put aside, so that nobody waits for it again, and is asked in the background
whether it is there until it says so. A holder that answers but fails to deliver is tried less and
less often.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from traceback import format_exception
from typing import TYPE_CHECKING, TypeVar

import anyio

from tierloom.stages.errors import Damaged, Lost, TierDown
from tierloom.stages.options import masked
from tierloom.stages.tiers.contract.object_reader import ObjectReader
from tierloom.stages.tiers.contract.read_cost import ReadCostModel
from tierloom.stages.tiers.contract.tier import Read, TierContext, TierCounts
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.client import Rejected
from tierloom.stages.tiers.server.tier import Server, ServerOptions

if TYPE_CHECKING:
    from tierloom.stages.tiers.landing.landed_reads import LandedReads
    from tierloom.stages.tiers.landing.receiver import Receiver

log = logging.getLogger(__name__)

T = TypeVar("T")

_GIVEN_UP = 4
"""A call that is given up after 1/4 of its time limit has failed."""
_REJECTED = 30.0
"""Seconds between two tries where they are not expected to help."""
_SHUN, _SHUNNED = 60.0, 1 << 12
"""Seconds for which an object that was of no use is not asked for again; how many such objects."""
_STALE = 60.0
"""Seconds after which what was measured counts no more."""
_STRIKES = 6
"""Doublings of the time between two tries, at most."""


class Holder(Server):
    """Its connections. Nothing is put there or deleted. Not thread-safe: on the tier's loop."""

    def __init__(
        self, options: ServerOptions, ctx: TierContext, counts: TierCounts, *, limit: float,
        probe: float, wake: Callable[[], None], borrows: bool = False,
    ) -> None:  # fmt: skip
        """`limit`: seconds that one call may take. `probe`: between two tries. `wake`: called when
        it was put aside. `borrows`: one connection more is for what is put there. Raises
        ConfigError."""
        super().__init__(options, ctx)
        self.counts = counts
        self.cost = ReadCostModel()
        self.busy = 0
        """Reads under way."""
        self._limit, self._probe, self._wake = limit, probe, wake
        self._aside = self._rejected = self._told = False
        self._retry = self._measured = 0.0
        self._strikes = 0
        self._shunned: dict[bytes, float] = {}
        self._causes: set[Lost] = set()
        # One connection is left to questions, which must not wait for objects.
        self._reading = anyio.Semaphore(options.connections - 1)
        self._landed: LandedReads | None = None
        connections = options.connections + borrows
        self._client.prepare(options.token_file, options.ca_file, connections)

    def land_in(self, receiver: Receiver, least: int) -> None:
        """Objects of at least so many bytes are to be written there by it, where it can."""
        from tierloom.stages.tiers.landing.landed_reads import LandedReads

        self._landed = LandedReads(
            self._client, self._send, receiver, self.ctx.arena, self.counts, least=least
        )

    async def close(self) -> None:
        if self._landed is not None:
            await self._landed.close()
        await super().close()

    @property
    def healthy(self) -> bool:
        """It may be asked."""
        return not self._aside and not self.is_oneself

    @property
    def is_oneself(self) -> bool:
        """It is the listener of this very pipeline, whose tiers have been looked at already."""
        return bool(self.ctx.epoch) and self._client.epoch == self.ctx.epoch

    @property
    def waits(self) -> float | None:
        """Seconds until it is to be tried again; None: there is no need."""
        if not self._aside or self.is_oneself:
            return None
        return max(0.0, self._retry - time.monotonic())

    @property
    def rank(self) -> float:
        """Less is better: seconds that a MiB should take, as far as it is known."""
        known = time.monotonic() - self._measured < _STALE
        return (self.cost.of(1 << 20) or 0.0) * (1 + self.busy) if known else 0.0

    def suspect(self) -> None:
        """Put it aside until it has been heard of again: others were quicker."""
        self._put_aside()

    async def look(self) -> None:
        """Ask whether it is there."""
        self._retry = time.monotonic() + self._probe
        if await self._within(self._ping) is not None and self._aside:
            self._aside = False
            log.info("%s is back", self.options.url)

    async def keeps(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of these it has. Never raises."""
        found = await self._within(lambda: self.exists(keys))
        if found is None:
            return [False] * len(keys)
        return [there and not self._shuns(k) for k, there in zip(keys, found, strict=True)]

    async def fetch(self, reads: Sequence[Read]) -> None:
        """`read`, but that it fails is said in the reads that it left undone. Never raises."""
        before = sum(r.object.arrived for r in reads if r.object)
        self.busy += 1
        try:
            async with self._reading:
                began, came = time.monotonic(), None
                if self.healthy:  # else it was put aside meanwhile
                    came = await self._within(lambda: self._read(reads), cargo=True)
        finally:
            self.busy -= 1
        nbytes = sum(r.object.arrived for r in reads if r.object) - before
        if came and nbytes:
            self._strikes, self._measured = 0, time.monotonic()
            self.cost.add(nbytes, self._measured - began)
        for read in reads:
            if came is None and not _whole(read):
                read.lost = Lost.TIER_DOWN
            elif read.lost is not None and (read.lost is Lost.CORRUPT or read.lost.unreadable):
                self.shun(read.key, read.lost)

    def shun(self, key: bytes, cause: Lost) -> None:
        """What it has under this key is of no use: do not ask for it for a while."""
        self._shunned.pop(key, None)
        while len(self._shunned) >= _SHUNNED:
            del self._shunned[next(iter(self._shunned))]
        self._shunned[key] = time.monotonic() + _SHUN
        if cause not in self._causes:
            self._causes.add(cause)
            cure = f"; {cause.cure}" if cause.unreadable else ""
            log.warning("%s has objects of no use here: %s%s", self.options.url, cause.name, cure)

    async def expel(self, key: bytes, proof: Damaged, seen: bytes) -> None:
        """Its owner will find the damage himself: a reader's word is no proof to him."""

    async def _fetch(self, reads: Sequence[Read], readers: list[ObjectReader]) -> None:
        if self._landed is None:
            await super()._fetch(reads, readers)
            return
        inline = await self._landed.fetch(reads)
        if inline:
            await super()._fetch(inline, readers)
        for read in inline:
            if read.object is not None:
                self._landed.came(read.object.header.nbytes)

    async def _read(self, reads: Sequence[Read]) -> bool:
        await self.read(reads)
        return True

    async def _ping(self) -> bytes:
        return await self._exchange(wire.Kind.PING, b"", wire.Kind.PONG)

    async def _within(self, work: Callable[[], Awaitable[T]], *, cargo: bool = False) -> T | None:
        """What `work` returns; None: it failed. `cargo`: it was to deliver objects."""
        began = time.monotonic()
        try:
            with anyio.fail_after(self._limit):
                done = await work()
        except Exception as error:
            self._failed(error, cargo)
            return None
        except anyio.get_cancelled_exc_class():
            if (waited := time.monotonic() - began) >= self._limit / _GIVEN_UP:
                self._failed(TimeoutError(f"canceled after {waited:.3g} s"), cargo)
            raise
        self._rejected = False
        return done

    def _failed(self, error: Exception, cargo: bool) -> None:
        self._strikes = min(self._strikes + cargo, _STRIKES)
        if isinstance(error, (Rejected, ssl.SSLError)) and not self._rejected:
            self._rejected = True
            log.warning("%s cannot be read: %s", self.options.url, masked(str(error)))
        elif not isinstance(error, (OSError, TierDown)) and not self._told:
            self._told = True
            trace = masked("".join(format_exception(error)))
            log.error("%s: an unexpected error\n%s", self.options.url, trace)
        elif not self._aside:
            log.info("%s is left alone: %s", self.options.url, masked(repr(error)))
        self._put_aside()

    def _put_aside(self) -> None:
        if not self._aside:
            pause = _REJECTED if self._rejected else self._probe * ((1 << self._strikes) - 1)
            self._aside, self._retry = True, time.monotonic() + min(pause, _REJECTED)
            extra = self.counts.extra
            extra["left_alone"] = extra.get("left_alone", 0) + 1
            self._wake()
        elif self._rejected:
            self._retry = time.monotonic() + _REJECTED

    def _shuns(self, key: bytes) -> bool:
        until = self._shunned.get(key)
        return until is not None and time.monotonic() < until


def _whole(read: Read) -> bool:
    """All that was asked for has come."""
    held = read.object
    return held is not None and held.loaded >= min(read.upto, len(held.header.frames))
