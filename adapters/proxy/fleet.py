"""The engines of a proxy: what was sent where, how busy each is, which are up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Collection, Iterable, Sequence
from typing import Any, Literal, TypeVar

import anyio
import xxhash

from tierloom.adapters.proxy.lmcache_side import ReceiverPorts
from tierloom.adapters.proxy.upstream import EngineFailed, EngineLate, Upstream
from tierloom.stages.errors import ConfigError

log = logging.getLogger("tierloom.proxy")
Role = Literal["prefill", "decode"]
T = TypeVar("T")
BLOCK = 512
"""Bytes of text that one hash stands for."""
KEPT = 1 << 16
"""Blocks of which it is known that an engine has had them, at most."""
BUSY = 256
"""Tokens of prefix for which a decoder with one running request more is taken."""
_PATIENCE = (0.5, 10.0)
"""Seconds until an engine that failed is probed: after the first time, and at most."""
_MISSES = 3
"""Probes without an answer after which requests that wait for an engine go to another one."""

_LOST = 15
"""Probes without an answer after which all that it has is ended: nothing comes of it any more."""


class EngineSeat:
    """One engine, as the proxy knows it."""

    def __init__(self, url: str, role: Role, ports: ReceiverPorts | None = None) -> None:
        """`ports`: where LMCache's prefillers reach it. Raises ConfigError."""
        self.upstream, self.role, self.ports = Upstream(url), role, ports
        self.draining = False
        self.running = 0
        """Requests that it works on, or whose decoder may still ask it."""
        self.queued = 0
        """Tokens of prompts that it is to compute."""
        self.host: dict[str, Any] | None = None
        """Where decoders reach it, once it has said so."""
        self.waiting: set[anyio.CancelScope] = set()
        """Requests that wait for their first byte, and could go to another engine."""
        self.streaming: set[anyio.CancelScope] = set()
        """Requests whose answer it is sending, or that nobody else can answer."""
        self.is_up = True
        self.misses = self._failures = 0
        self._probe_at = 0.0
        self._had: dict[int, None] = {}

    @property
    def url(self) -> str:
        return self.upstream.url

    def had(self, blocks: Sequence[int]) -> int:
        """How many of the first blocks it has had."""
        for n, block in enumerate(blocks):
            if block not in self._had:
                return n
        return len(blocks)

    def has(self, blocks: Iterable[int]) -> None:
        """It is sent these, which are the latest now."""
        for block in blocks:
            self._had.pop(block, None)
            self._had[block] = None
        while len(self._had) > KEPT:
            del self._had[next(iter(self._had))]

    def failed(self, why: str) -> None:
        """Leave it alone until it answers a probe; what it knew is taken for lost."""
        self.host = None
        self._had.clear()
        self.upstream.close()
        if self.is_up:
            log.warning("proxy: %s engine %s %s; left alone", self.role, self.url, why)
            self._put_off()
        self.is_up = False

    def _put_off(self) -> None:
        """The next probe comes later than the one before did."""
        low, high = _PATIENCE
        self._probe_at = time.monotonic() + min(low * 2.0 ** min(self._failures, 8), high)
        self._failures += 1

    def answered(self) -> None:
        """It works."""
        self.is_up = True
        self._failures = self.misses = 0

    @property
    def is_to_be_probed(self) -> bool:
        """A request is in its hands, or it may be well again."""
        if self.is_up:
            return bool(self.waiting or self.streaming)
        return time.monotonic() >= self._probe_at

    def abandon(self, *, streams: bool = False) -> None:
        """Requests that wait for it go elsewhere. `streams`: what it is sending ends, too."""
        for scope in [*self.waiting, *(self.streaming if streams else ())]:
            scope.cancel()

    async def within(self, seconds: float, asked: Awaitable[T], *, last: bool = False) -> T:
        """What it answers. Raises EngineFailed, also once it answers no probes, and EngineLate.
        `last`: nobody else can be asked, so that it gets more time to come to life."""
        waiting = self.streaming if last else self.waiting
        with anyio.CancelScope(deadline=anyio.current_time() + seconds) as scope:
            waiting.add(scope)
            try:
                return await asked
            except EngineFailed as error:
                self.failed(str(error))
                raise
            finally:
                waiting.discard(scope)
        if anyio.current_time() >= scope.deadline:
            raise EngineLate(f"did not answer in {seconds:g} s")
        raise EngineFailed("answers no probes, or was removed")

    async def probe(self, limit: float) -> None:
        """Ask whether it is alive: an engine may have been stopped with a request in its hands."""
        try:
            with anyio.fail_after(limit):
                answer = await self.upstream.ask(b"GET", b"/health")
                answer.close()
            well = answer.status < 500
        except (EngineFailed, TimeoutError):
            well = False
        if well:
            if not self.is_up:
                log.info("proxy: %s engine %s answers again", self.role, self.url)
            self.is_up, self.misses = True, 0
            return
        self.misses += 1
        if not self.is_up and not self.streaming:
            self._put_off()
        elif self.misses >= _MISSES:
            self.failed(f"did not answer {self.misses} probes")
            self.abandon(streams=self.misses >= _LOST)


class Fleet:
    """All engines."""

    def __init__(self) -> None:
        self.seats: list[EngineSeat] = []
        self.bytes_per_token = 4.0

    def add(self, url: str, role: Role, ports: ReceiverPorts | None = None) -> EngineSeat:
        """Raises ConfigError, also for one that is there and is not draining."""
        seat = EngineSeat(url, role, ports)
        if (old := self._find(seat.url, role)) is None:
            self.seats.append(seat)
            return seat
        if not old.draining:
            raise ConfigError(f"engine {url}: is there already, to {role}")
        old.draining, old.ports = False, ports
        return old

    def known(self, url: str, role: Role) -> EngineSeat:
        """Raises ConfigError."""
        if (seat := self._find(Upstream(url).url, role)) is None:
            raise ConfigError(f"engine {url}: is not there, to {role}; GET shows those that are")
        return seat

    def _find(self, url: str, role: Role) -> EngineSeat | None:
        return next((s for s in self.seats if (s.url, s.role) == (url, role)), None)

    def drain(self, seat: EngineSeat) -> None:
        """No new requests; it is forgotten when the last one is over."""
        seat.draining = True
        self.settle(seat)

    def remove(self, seat: EngineSeat) -> None:
        """At once. Requests that wait for it go elsewhere; its streams run on."""
        seat.draining = True
        self.seats.remove(seat)
        seat.abandon()
        seat.upstream.close(for_good=True)

    def settle(self, seat: EngineSeat) -> None:
        """After a request of it ended."""
        if seat.draining and not seat.running and seat in self.seats:
            self.remove(seat)
            log.info("proxy: %s engine %s is drained", seat.role, seat.url)

    def prefiller(
        self, blocks: Sequence[int], tokens: float, without: Collection[EngineSeat]
    ) -> EngineSeat | None:
        """Who is through with a prompt of so many tokens first; None: nobody is up."""
        fresh = tokens / max(1, len(blocks))
        return min(
            (s for s in self._open("prefill", without) if s.is_up),
            key=lambda s: s.queued + tokens - fresh * s.had(blocks),
            default=None,
        )

    def decoder(
        self, blocks: Sequence[int], tokens: float, without: Collection[EngineSeat]
    ) -> EngineSeat | None:
        """Who has most of a prompt and least to do. One that is down is tried if all are."""
        fresh = tokens / max(1, len(blocks))
        return min(
            self._open("decode", without),
            key=lambda s: (not s.is_up, BUSY * s.running - fresh * s.had(blocks)),
            default=None,
        )

    def _open(self, role: Role, without: Collection[EngineSeat]) -> list[EngineSeat]:
        return [s for s in self.seats if s.role == role and not s.draining and s not in without]

    @property
    def is_ready(self) -> bool:
        """Some decoder is up."""
        return any(seat.is_up for seat in self._open("decode", ()))

    def tokens(self, nbytes: int) -> float:
        """What a text of so many bytes has, by what answers said of those before."""
        return nbytes / self.bytes_per_token

    def correct(self, nbytes: int, tokens: int) -> None:
        """`tokens`: what an engine counted in a text of `nbytes`. Images are no text."""
        if tokens > 0 and nbytes >= 64 and 0.5 <= (ratio := nbytes / tokens) <= 16:
            self.bytes_per_token += 0.1 * (ratio - self.bytes_per_token)

    async def watch(self, every: float) -> None:
        """Probe whoever works on requests or failed, for as long as the proxy runs."""
        while True:
            await asyncio.sleep(every)
            seats = [seat for seat in self.seats if seat.is_to_be_probed]
            await asyncio.gather(*(seat.probe(every) for seat in seats))


def blocks_of(model: str, text: bytes) -> list[int]:
    """A chain of hashes over a text's whole blocks."""
    link = xxhash.xxh3_64_intdigest(model.encode("utf-8", "surrogatepass"))
    blocks = []
    for at in range(0, len(text) - BLOCK + 1, BLOCK):
        link = xxhash.xxh3_64_intdigest(text[at : at + BLOCK], seed=link)
        blocks.append(link)
    return blocks
