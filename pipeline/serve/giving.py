"""The answer to a TAKE: objects that were promised, as they come."""

from __future__ import annotations

import time

from tierloom.pipeline.handoff.promises import ArrivingObject
from tierloom.pipeline.serve.own_tiers import OwnTiers
from tierloom.pipeline.serve.terms import RateLimit
from tierloom.stages.errors import Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.connection import Connection
from tierloom.stages.tiers.server.taking import PieceHead, Take

_LOOK = 0.25
"""Seconds between two looks whether the client still waits."""


class Giving:
    """One TAKE, on the listener's loop."""

    def __init__(
        self, connection: Connection, number: int, store: OwnTiers, space: bytes, limit: RateLimit
    ) -> None:
        """`space`: the client's namespace. Raises BadMessage where nothing is promised."""
        if store.promises is None:
            raise wire.BadMessage("nothing is promised here")
        self._connection, self._number = connection, number
        self._store, self._promises = store, store.promises
        self._space, self._limit = space, limit
        self._begun: dict[int, tuple[ArrivingObject, int]] = {}
        """Objects that are being stored, and how many frames of each were sent."""
        self._sent = 0

    async def answer(self, take: Take) -> None:
        """Returns when all has been said of each key. A ticket of which all was given has ended.
        Raises TierDown, OSError."""
        try:
            await self._answer(take)
        finally:
            for begun, _ in self._begun.values():
                begun.object.lease.release()

    async def _answer(self, take: Take) -> None:
        left, whole = dict(enumerate(take.keys)), True
        if self._space != self._store.namespace:  # names alone do not say whose share it is
            await self._refuse(left, Lost.ABSENT)
            return
        until = time.monotonic() + take.wait
        with self._promises.watcher() as watcher:
            while left:
                watcher.clear()  # before the look: what comes during it is looked for again
                before = self._sent
                for index, key in list(left.items()):
                    code = await self._give(take, index, key)
                    if code is None:  # it may come yet
                        continue
                    del left[index]
                    if code:  # what follows it is of no use
                        whole = False
                        await self._refuse(left, Lost(code))
                        break
                if self._sent > before:
                    until = time.monotonic() + take.wait
                elif time.monotonic() >= until:
                    whole = False
                    await self._refuse(left, Lost.LATE)
                elif not self._connection.usable:
                    return
                else:
                    await watcher.wait(min(_LOOK, until - time.monotonic()))
        if whole or self._promises.is_settled(take.ticket):
            self._promises.taken(take.ticket, take.askers)

    async def _give(self, take: Take, index: int, key: bytes) -> int | None:
        """Send an object, or what is there of it; its code, or None where more is to come."""
        if index in self._begun:
            return await self._give_frames(take, index, key)
        # Before the look: what is stored between the two was coming.
        coming = self._promises.expects(take.ticket, key, later=take.later)
        with self._store.reservation() as reservation:
            obj = await self._store.read(self._space, reservation, key, room=True)
            if obj is Lost.ABSENT and (other := self._promises.kept_as(key)):
                obj = await self._store.read(self._space, reservation, other, room=True)
            if obj is Lost.ABSENT and (begun := self._promises.arriving(key)) is not None:
                self._begun[index] = begun, 0
                return await self._give_frames(take, index, key)
            if obj is Lost.ABSENT and coming:
                return None
            if not isinstance(obj, Lost) and not await self._limit.wait(obj.header.nbytes):
                obj = Lost.NO_ROOM
            if isinstance(obj, Lost):
                await self._say(PieceHead(index, obj))
                return obj
            await self._send(index, obj, 0, obj.header.nbytes)
            return wire.DONE

    async def _give_frames(self, take: Take, index: int, key: bytes) -> int | None:
        """Send what has come of an object since the last time; the header when it is sealed."""
        begun, sent = self._begun[index]
        coming = self._promises.expects(take.ticket, key, later=take.later)
        code = await self._give_further(index, begun, sent)
        if code is None and not coming:  # its store was given up
            code = Lost.ABSENT
            await self._say(PieceHead(index, code))
        if code is not None:
            del self._begun[index]
            begun.object.lease.release()
        return code

    async def _give_further(self, index: int, begun: ArrivingObject, sent: int) -> int | None:
        obj, sealed, ready = begun.object, begun.object.sealed, begun.ready
        bounds = obj.header.boundaries
        if ready > sent:
            if not await self._limit.wait(bounds[ready] - bounds[sent]):
                await self._say(PieceHead(index, Lost.NO_ROOM))
                return Lost.NO_ROOM
            await self._send(index, obj, bounds[sent], bounds[ready])
            self._begun[index] = begun, ready
        if not sealed:
            return None
        await self._send(index, obj, 0, bounds[0])
        return wire.DONE

    async def _send(self, index: int, obj: Object, begin: int, end: int) -> None:
        head = self._message(PieceHead(index, wire.DONE, obj.header.nbytes, begin, end))
        self._sent += end - begin
        await self._connection.send(head, obj.lease.view[begin:end], leases=(obj.lease,))

    async def _refuse(self, left: dict[int, bytes], cause: Lost) -> None:
        for index in list(left):
            await self._say(PieceHead(index, cause))
        left.clear()

    async def _say(self, piece: PieceHead) -> None:
        await self._connection.send(self._message(piece))

    def _message(self, piece: PieceHead) -> bytes:
        return wire.message(wire.Kind.PIECE, self._number, piece.pack())
