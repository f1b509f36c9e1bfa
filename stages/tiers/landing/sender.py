"""Sender: objects of our own, written into memory of other engines.

An object's lease is held until each of its writes is through, whoever has given it up meanwhile. A
stopped reader lets writes stay under way for any time, and an agent reads what is left of them
whenever it comes back; so when one is given up and not through, the agent is destroyed, which
alone lets go of the memory. What was to go to others goes on by the next agent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Mapping
from typing import TypeVar

from tierloom.stages.errors import ConfigError, Lost, TierDown
from tierloom.stages.memory.arena import Arena, Lease
from tierloom.stages.tiers.landing.landing_protocol import (
    PIECE,
    AgentCard,
    Landed,
    pack_note,
    pieces,
)
from tierloom.stages.tiers.landing.polled import PolledThread
from tierloom.stages.tiers.nixl.agent import Agent, Transfer

log = logging.getLogger(__name__)

T = TypeVar("T")

_AT_ONCE = 4
"""Writes of one object that are under way together."""
_STALL = 1.5
"""Seconds for one write; then the object is given up."""
_DOUBT, _DRAIN = 2.0, 0.3
"""Seconds after which what was given up must be through; that others then have for what is under
way."""
_MET = 500
"""Receivers after which the agent is made anew: each leaves a file descriptor open."""


class Sending:
    """One object on its way. Of the sender's thread."""

    __slots__ = (
        "address", "begin", "done", "end", "failed", "given_up", "lease", "loop", "moved",
        "posted", "ticket", "to", "under_way",
    )  # fmt: skip

    def __init__(
        self, to: str, lease: Lease, begin: int, end: int, address: int, ticket: int
    ) -> None:
        """Bytes `begin` to `end` of a lease, to `address` of the agent `to`."""
        self.to, self.address, self.ticket = to, address, ticket
        self.lease, self.begin, self.end = lease.retain(), begin, end
        self.under_way: list[Transfer] = []
        self.posted = 0
        self.given_up = 0.0
        self.moved = time.monotonic()
        self.failed = False
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Landed] = self.loop.create_future()

    @property
    def left(self) -> bool:
        """More is to be written."""
        if self.given_up or self.failed:
            return False
        return self.posted < pieces(self.end - self.begin)


class Sender(PolledThread):
    """Begins with the first reader that has memory to be written into."""

    def __init__(self, arena: Arena, backend: str, params: Mapping[str, str]) -> None:
        """`arena`: of all leases that are sent. `params`: of NIXL's plugin."""
        super().__init__("tierloom-sender")
        self._arena, self._backend, self._params = arena, backend, params
        self._process, self._agents = secrets.token_hex(8), 0
        self._agent: Agent | None = None
        self._cards: dict[str, tuple[bytes, int]] = {}
        """Metadata by name of the agent, and how many connections told it."""
        self._met: set[str] = set()
        self._count = 0
        self._live: list[Sending] = []
        self._fence_by = 0.0
        self.fences = self.written = 0

    async def meet(self, card: AgentCard) -> bool:
        """Whether that agent can be written to. It is forgotten by as many calls of `part`."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bool] = loop.create_future()
        if not self.post(self._meet, card, loop, done):
            return False
        return await done

    def part(self, name: str) -> None:
        self.post(self._part, name)

    def send(self, sending: Sending) -> None:
        """Its `done` says how many writes there were, once all of them are over and its lease is
        released."""
        if not self.post(self._live.append, sending):
            self._over(sending)

    def give_up(self, sending: Sending) -> None:
        """Write no more of it."""
        self.post(self._give_up, sending)

    # On the thread.

    @property
    def _busy(self) -> bool:
        return bool(self._live)

    def _meet(
        self, card: AgentCard, loop: asyncio.AbstractEventLoop, done: asyncio.Future[bool]
    ) -> None:
        metadata, count = self._cards.get(card.name, (card.metadata, 0))
        met = metadata == card.metadata and self._knows(card.name, metadata)
        if met:
            self._cards[card.name] = metadata, count + 1
        _answer(loop, done, met)

    def _part(self, name: str) -> None:
        metadata, count = self._cards.get(name, (b"", 0))
        if count > 1:
            self._cards[name] = metadata, count - 1
            return
        self._cards.pop(name, None)
        if name in self._met and self._agent is not None:
            self._met.discard(name)
            self._agent.part(name)

    def _knows(self, name: str, metadata: bytes) -> bool:
        """Whether our agent knows another, which may be told to it now."""
        if name in self._met:
            return True
        if self._count >= _MET and not self._live:
            self._shut()
        try:
            if self._agent is None:
                self._open()
            assert self._agent is not None
            self._count += 1
            said = self._agent.meet(metadata)
        except (ConfigError, TierDown) as error:
            log.warning("objects are not written into another engine's memory: %s", error)
            if not self._live:  # half of it may have been taken, which nothing else undoes
                self._shut()
            return False
        if said == name:
            self._met.add(name)
            return True
        log.warning("an agent calls itself %r, not %r: nothing is written to it", said, name)
        if said not in self._met:
            self._agent.part(said)
        return False

    def _open(self) -> None:
        self._agents += 1
        name = f"tierloom-sender-{os.getpid()}-{self._process}-{self._agents}"
        self._agent = Agent(
            self._backend, self._params, self._arena, shared=False, name=name, polled=True
        )

    def _shut(self) -> None:
        """Destroy the agent: it reads no lease any more."""
        if self._agent is not None:
            self._agent.destroy(t for sending in self._live for t in sending.under_way)
        self._agent, self._met, self._count = None, set(), 0

    def _look(self) -> bool:
        now, moved = time.monotonic(), False
        for sending in list(self._live):
            moved = self._step(sending, now) or moved
        stuck = [s for s in self._live if s.under_way and (s.given_up or s.failed)]
        if not self._fence_by:
            if any(now - s.moved > _DOUBT and now - s.given_up > _DOUBT for s in stuck):
                self._fence_by = now + _DRAIN
        elif now > self._fence_by or all(s in stuck for s in self._live if s.under_way):
            self._fence()
        return moved

    def _step(self, sending: Sending, now: float) -> bool:
        """Look at an object's writes, and begin more; whether one was over, or may be: some are as
        soon as they have begun."""
        before, posted = len(sending.under_way), sending.posted
        for transfer in list(sending.under_way):
            try:
                if not transfer.done():
                    continue
            except TierDown as error:
                log.info("an object did not get to %s: %s", sending.to, error)
                sending.failed = True
            sending.under_way.remove(transfer)
            sending.moved = now
        moved = len(sending.under_way) < before
        if sending.under_way and now - sending.moved > _STALL:
            self._give_up(sending)
        while sending.left and len(sending.under_way) < _AT_ONCE and not self._fence_by:
            self._write(sending)
        if not sending.under_way and not sending.left:
            self._over(sending)
        return moved or sending.posted > posted

    def _write(self, sending: Sending) -> None:
        metadata, _ = self._cards.get(sending.to, (b"", 0))
        if not metadata or not self._knows(sending.to, metadata):
            sending.failed = True
            return
        assert self._agent is not None
        at = sending.begin + sending.posted * PIECE
        nbytes = min(PIECE, sending.end - at)
        note = pack_note(sending.ticket, sending.posted)
        sending.posted += 1  # also where it fails: some of it may be on its way
        try:
            transfer = self._agent.begin(
                "WRITE", [(sending.address + at - sending.begin, nbytes, 0)], "DRAM",
                sending.lease.at(at, nbytes), other=sending.to, note=note,
            )  # fmt: skip
            sending.under_way.append(transfer)
        except TierDown as error:
            log.info("an object cannot be written to %s: %s", sending.to, error)
            sending.failed = True
        sending.moved = time.monotonic()

    def _give_up(self, sending: Sending) -> None:
        sending.given_up = sending.given_up or time.monotonic()

    def _over(self, sending: Sending) -> None:
        """None of its writes is under way."""
        if sending in self._live:
            self._live.remove(sending)
        lease, code = sending.lease, 0
        whole = sending.posted == pieces(sending.end - sending.begin)
        if sending.failed or not whole:
            code = Lost.TIER_DOWN if sending.failed or not sending.given_up else Lost.LATE
        self.written += not code
        lease.release()
        _answer(sending.loop, sending.done, Landed(code, sending.posted, sending.ticket))

    def _fence(self) -> None:
        """Let go of what cannot be ended otherwise."""
        self._fence_by = 0.0
        self.fences += 1
        log.info("writes that nobody takes are ended by a new agent")
        self._shut()
        for sending in [s for s in self._live if s.under_way]:
            sending.under_way, sending.failed = [], True
            self._over(sending)

    def _end(self) -> None:
        self._shut()
        for sending in list(self._live):
            sending.under_way, sending.failed = [], True
            self._over(sending)


def _answer(loop: asyncio.AbstractEventLoop, done: asyncio.Future[T], what: T) -> None:
    def tell() -> None:
        if not done.done():
            done.set_result(what)

    try:
        loop.call_soon_threadsafe(tell)
    except RuntimeError:  # it is closed: nobody waits
        return
