"""One client's objects that are written into memory of its own; see docs/protocol.md."""

from __future__ import annotations

import asyncio
import hmac
from functools import partial

import anyio

from tierloom.pipeline.serve.cuts import AHEAD, given_part
from tierloom.pipeline.serve.object_store import ObjectStore
from tierloom.pipeline.serve.own_tiers import OwnTiers
from tierloom.pipeline.serve.terms import Terms
from tierloom.stages.errors import Lost, TierDown
from tierloom.stages.kv.object import Object
from tierloom.stages.tiers.contract.concurrently import map_concurrently
from tierloom.stages.tiers.landing.landing_protocol import (
    AgentCard,
    LandingPlace,
    pack_landed,
    places_of,
)
from tierloom.stages.tiers.landing.sender import Sender, Sending
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.connection import Connection
from tierloom.stages.tiers.server.protocol import Kind


class Landings:
    """What a session does for AGENT, LAND and ABORT."""

    def __init__(
        self, connection: Connection, store: ObjectStore | OwnTiers, terms: Terms, sender: Sender,
        space: bytes, said: bytes,
    ) -> None:  # fmt: skip
        """`said`: what both sides have proved."""
        self._connection, self._store, self._terms = connection, store, terms
        self._sender, self._space, self._said = sender, space, said
        self._card: AgentCard | None = None
        self._sendings: list[Sending] = []
        self._aborted = self._last = False
        """Of this question: the client wants no more; the last answer is on its way."""
        self._error: Exception | None = None

    async def answer(self, message: wire.Message) -> None:
        """Raises BadMessage."""
        kind, number, body = message
        if kind is Kind.AGENT:
            known = await self._agree(AgentCard.of(body))
            code = wire.DONE if known else Lost.TIER_DOWN
            await self._connection.send(wire.message(Kind.AGREED, number, bytes([code])))
        elif kind is Kind.LAND:
            if self._card is None:
                raise wire.BadMessage("LAND without an agent")
            await self._land(number, places_of(body, self._card))
        elif body:  # an ABORT of what is over already
            raise wire.BadMessage("ABORT has no body")

    def close(self) -> None:
        if self._card is not None:
            self._sender.part(self._card.name)
            self._card = None

    async def _agree(self, card: AgentCard) -> bool:
        """Whether it can be written to. Raises BadMessage where not the client describes it."""
        proof = wire.proof(self._terms.token, b"agent", self._said, card.said)
        if not hmac.compare_digest(card.proof, proof):
            raise wire.BadMessage("an agent that the client does not vouch for")
        self.close()
        with anyio.CancelScope(shield=True):
            if await self._sender.meet(card):
                self._card = card
        return self._card is not None

    async def _land(self, number: int, places: list[LandingPlace]) -> None:
        self._aborted, self._last, self._error = False, False, None
        error: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._hear, number, tasks.cancel_scope)
            try:
                await self._write_all(number, places)
            except Exception as raised:  # a task group would wrap it
                error = raised
            tasks.cancel_scope.cancel()
        if error is not None or self._error is not None:
            raise (error or self._error or TierDown("unreachable"))

    async def _hear(self, number: int, scope: anyio.CancelScope) -> None:
        """Wait for an ABORT, or for the client's end; nothing else is due meanwhile."""
        try:
            await self._connection.readable()
            if self._last:  # the next question
                return
            with anyio.CancelScope(shield=True):
                message = await self._connection.message()
        except Exception as error:
            self._error = error
        else:
            if message == (Kind.ABORT, number, b""):
                self._aborted = True
                for sending in self._sendings:
                    self._sender.give_up(sending)
                return
            self._error = wire.BadMessage(f"{message.kind.name} came while objects land")
        scope.cancel()

    async def _write_all(self, number: int, places: list[LandingPlace]) -> None:
        """A few objects at once are read and written; what is said of them is in order."""
        for begin in range(0, len(places), AHEAD):
            part, final = places[begin : begin + AHEAD], begin + AHEAD >= len(places)
            with self._store.reservation() as reservation:
                keys = [place.key for place in part]
                objects: list[Object | Lost] = [Lost.NO_ROOM] * len(keys)
                if not self._terms.limit.exceeded and not self._aborted:
                    room = await self._store.make_room(self._space, reservation, keys)
                    read = partial(self._store.read, self._space, reservation, room=room)
                    objects = await map_concurrently(read, keys, AHEAD)
                try:
                    for place, obj in zip(part, objects, strict=True):
                        await self._announce(number, place, obj, final and place is part[-1])
                    for sending in self._sendings:
                        landed = pack_landed(await asyncio.shield(sending.done))
                        self._last = final and sending is self._sendings[-1]
                        await self._connection.send(wire.message(Kind.LANDED, number, landed))
                finally:
                    await self._let_go()

    async def _announce(
        self, number: int, place: LandingPlace, obj: Object | Lost, final: bool
    ) -> None:
        """Say what is about to be written, and have it written. `final`: of the last object."""
        item, data = given_part(place.wanted, Lost.LATE if self._aborted else obj)
        if not item.code and len(data) > place.room:
            item = wire.Item(wire.BYTES, 0, item.nbytes, 0, 0)
        elif len(data) and not await self._terms.limit.wait(len(data)):
            item = wire.Item(Lost.NO_ROOM, 0, 0, 0, 0)
        coming = not item.code and len(data) > 0
        self._last = final and not coming and not self._sendings
        await self._connection.send(wire.message(Kind.LANDING, number, wire.pack(item)))
        if not coming:
            return
        assert self._card is not None
        assert not isinstance(obj, Lost)
        sending = Sending(
            self._card.name, obj.lease, item.begin, item.end, place.address, place.ticket
        )
        self._sendings.append(sending)
        self._sender.send(sending)
        if self._aborted:
            self._sender.give_up(sending)

    async def _let_go(self) -> None:
        """Until each write is over: what it reads stays, and is counted, for as long."""
        sendings, self._sendings = self._sendings, []
        with anyio.CancelScope(shield=True):
            for sending in sendings:
                if not sending.done.done():
                    self._sender.give_up(sending)
                await sending.done
