"""Reads of a server's objects by writes of its own into our memory.

A question is asked by a task of its own: whoever waits for it may go at any time, and the question
still has to come to its end, since nothing else tells when the places are free again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack

import anyio

from tierloom.stages.errors import ArenaFull, BadObject, Lost, TierDown
from tierloom.stages.kv.object import Header
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.object_reader import ObjectReader
from tierloom.stages.tiers.contract.tier import Read, TierCounts
from tierloom.stages.tiers.landing import landing_protocol as landing_wire
from tierloom.stages.tiers.landing.arrival import Landing
from tierloom.stages.tiers.landing.landing_protocol import AgentCard, LandingPlace
from tierloom.stages.tiers.landing.receiver import Receiver
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.client import Client, refuse
from tierloom.stages.tiers.server.connection import Connection

log = logging.getLogger(__name__)

_PAUSE = 30.0
"""Seconds for which objects come inline from where landing has failed."""
_WHOLE = 0xFFFFFFFF


Ask = Callable[[Connection, wire.Kind, bytes], Awaitable[int]]
"""How a question is sent on a connection: returns its number."""


class LandedReads:
    """For the connections of one client. On one loop."""

    def __init__(
        self, client: Client, ask: Ask, receiver: Receiver, arena: Arena, counts: TierCounts, *,
        least: int,
    ) -> None:  # fmt: skip
        """`least`: bytes of an object from which on it lands."""
        self._client, self._ask, self._receiver = client, ask, receiver
        self._arena, self._counts, self._least = arena, counts, least
        self._largest = 0
        """Bytes of the longest object that came lately."""
        self._not_before = 0.0
        self._questions: set[asyncio.Task[None]] = set()
        client.lands = True

    def came(self, nbytes: int) -> None:
        """So long is an object here."""
        self._largest = max(self._largest, nbytes)

    async def fetch(self, reads: Sequence[Read]) -> list[Read]:
        """Land what can be; returns the reads that are to come inline. Raises TierDown, OSError."""
        usable = self._client.welcome.flags & wire.LANDS and time.monotonic() >= self._not_before
        if not usable or not self._receiver.ready:
            return list(reads)
        question = _Question(self, [])
        inline = []
        for read in reads:
            job = self._job(read)
            if job is None:
                inline.append(read)
            else:
                question.jobs.append(job)
        if question.jobs:
            task = asyncio.create_task(question.run())
            self._questions.add(task)
            task.add_done_callback(self._over)
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                question.give_up(task)
                raise
            except _Fenced:
                inline += [job.read for job in question.jobs if job.read.lost is None]
                return inline
        return inline + question.inline

    async def close(self) -> None:
        """The receiver must have been closed before, so that nothing lands."""
        for task in self._questions:
            task.cancel()
        await asyncio.gather(*self._questions, return_exceptions=True)

    def _job(self, read: Read) -> _Job | None:
        """A read and its place; None: it comes inline."""
        held_object = read.object
        if held_object is None:
            first, nbytes, upto, room = 0, 0, min(read.upto, _WHOLE), self._largest
        else:
            boundaries, first = held_object.header.boundaries, held_object.loaded
            upto = max(first, min(read.upto, len(boundaries) - 1))
            nbytes = held_object.header.nbytes
            room = boundaries[upto] - (boundaries[first] if first else 0)
        landing = self._receiver.lease(room) if room and room >= self._least else None
        if landing is None:
            return None
        place = LandingPlace(read.key, first, upto, nbytes, landing.place, room, landing.ticket)
        return _Job(read, place, landing)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._questions.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("a question about objects to land failed: %r", error)

    def failed(self) -> None:
        """Let objects come inline for a while."""
        self._not_before = time.monotonic() + _PAUSE


class _Fenced(TierDown):
    """No fault of who was asked: another did not say whether it was through."""


class _Job:
    """One read of a question."""

    def __init__(self, read: Read, place: LandingPlace, landing: Landing) -> None:
        self.read, self.place, self.landing = read, place, landing
        self.reader: ObjectReader | None = None
        self.result: asyncio.Future[Header] | None = None
        self.loaded = 0


class _Question:
    """One LAND, from its places to the last word about them."""

    def __init__(self, owner: LandedReads, jobs: list[_Job]) -> None:
        self.jobs, self.inline = jobs, list[Read]()
        self._owner, self._receiver = owner, owner._receiver
        self._connection: Connection | None = None
        self._number = 0
        self._asked = self._given_up = False
        self._abort: asyncio.Task[None] | None = None

    def give_up(self, task: asyncio.Task[None]) -> None:
        """Nobody waits any more: let the server stop, and hear it say so."""
        self._given_up = True
        if not self._asked:
            task.cancel()
            return
        for job in self.jobs:
            self._receiver.give_up(job.landing)
        self._abort = asyncio.create_task(self._send_abort())

    async def run(self) -> None:
        with ExitStack() as leases:
            try:
                async with self._owner._client.connection() as connection:
                    card = await self._introduce(connection)
                    if card is None:
                        self.inline = [job.read for job in self.jobs]
                        return
                    await self._exchange(connection, leases)
            finally:
                # Of what was asked and not said to be over, nobody knows what is on its way.
                end = self._receiver.lost if self._asked else self._receiver.free
                for job in self.jobs:
                    if job.landing.said < 0:
                        end(job.landing)
                        if self._asked:
                            self._owner.failed()
            for job in self.jobs:
                if job.result is not None:
                    await self._deliver(job)

    async def _introduce(self, connection: Connection) -> AgentCard | None:
        """Have the server know our agent; None: it does not write to it."""
        card = self._receiver.card
        if card is None or any(not card.holds(job.place) for job in self.jobs):
            return None
        if connection.agent == card.name:
            return card
        proof = self._owner._client.proof(connection, card.said)
        ask = self._owner._ask
        number = await ask(connection, wire.Kind.AGENT, card._replace(proof=proof).pack())
        (code,) = wire.codes_of(await _answer(connection, number, wire.Kind.AGREED), 1)
        if code:
            self._owner.failed()
            return None
        connection.agent = card.name
        self._receiver.met()
        return card

    async def _exchange(self, connection: Connection, leases: ExitStack) -> None:
        """Ask, and read each answer to its end."""
        self._connection = connection
        places = landing_wire.pack_places([job.place for job in self.jobs])
        told, left = iter(self.jobs), {job.place.ticket: job for job in self.jobs}
        waiting: dict[int, _Job] = {}
        with anyio.CancelScope() as scope:
            for each in self.jobs:
                each.landing.on_fence = scope.cancel
            if any(each.landing.failure for each in self.jobs):  # fenced just before
                self.inline = [job.read for job in self.jobs]
                return
            self._asked = True
            self._number = await self._owner._ask(connection, wire.Kind.LAND, places)
            while left:
                message = await connection.message()
                if message.number != self._number:
                    raise wire.BadMessage("a reply to another request")
                if message.kind is wire.Kind.LANDED:
                    landed = landing_wire.landed_of(message.body)
                    ended = waiting.pop(landed.ticket, None)
                    if ended is None or landed.posted > landing_wire.pieces(ended.place.room):
                        raise wire.BadMessage("writes that were not announced are over")
                    self._said(ended, landed.posted)
                    del left[landed.ticket]
                    continue
                refuse(message, wire.Kind.LANDING)
                job = next(told, None)
                if job is None:
                    raise wire.BadMessage("more objects land than were asked for")
                largest = self._owner._client.welcome.largest
                item = landing_wire.landing_of(message.body, job.place, largest)
                if item.code or item.begin == item.end:
                    self._not_coming(job, item)
                    self._said(job, 0)
                    del left[job.place.ticket]
                else:
                    waiting[job.place.ticket] = job
                    self._coming(job, item, leases)
            if self._abort is not None:
                await self._abort
            return
        if self._abort is not None:
            self._abort.cancel()
        raise _Fenced("the landing space was taken away")

    def _said(self, job: _Job, posted: int) -> None:
        job.landing.said = posted
        self._receiver.written(job.landing, posted)

    def _not_coming(self, job: _Job, item: wire.Item) -> None:
        if self._given_up:
            return
        if item.code == wire.BYTES or not item.code:
            self._owner.came(item.nbytes)
            self.inline.append(job.read)
        else:
            ObjectReader(job.read, self._owner._arena, self._owner._counts).miss(Lost(item.code))

    def _coming(self, job: _Job, item: wire.Item, leases: ExitStack) -> None:
        """Have what lands copied on, if there is somebody and room for it."""
        header, target = None, None
        job.loaded = item.loaded
        if not self._given_up:
            job.reader = reader = ObjectReader(job.read, self._owner._arena, self._owner._counts)
            leases.callback(reader.close)
            try:
                target = reader.lease(item.nbytes)
            except ArenaFull:
                reader.miss(Lost.NO_ROOM)
                job.reader = None
            if reader.held is not None:
                header = reader.held.header
                boundaries = header.boundaries
                if (item.begin, item.end) != (boundaries[job.place.first], boundaries[item.loaded]):
                    raise wire.BadMessage("other frames are about to come than were requested")
        key = job.read.key
        job.result = self._receiver.expect(job.landing, item, key, header, target)

    async def _deliver(self, job: _Job) -> None:
        assert job.result is not None
        reader = job.reader
        try:
            header = await job.result
        except BadObject as error:
            if reader is None or self._given_up:
                return
            if reader.held is None:
                reader.refuse(error)
            else:  # another may have taken its place since its first frames came
                reader.miss()
            return
        except TierDown:
            if reader is not None and not self._given_up:
                self.inline.append(job.read)
            return
        if reader is not None and not self._given_up:
            self._receiver.landed += 1
            reader.deliver(header, job.loaded)
            self._owner.came(header.nbytes)

    async def _send_abort(self) -> None:
        assert self._connection is not None
        try:
            await self._connection.send(wire.message(wire.Kind.ABORT, self._number))
        except (OSError, TierDown):
            return


async def _answer(connection: Connection, number: int, wanted: wire.Kind) -> bytes:
    message = await connection.message()
    refuse(message, wanted)
    if message.number != number:
        raise wire.BadMessage("a reply to another request")
    return message.body
