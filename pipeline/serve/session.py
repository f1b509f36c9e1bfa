"""One client of `tierloom serve`: its messages, answered one at a time.

What it holds is bounded, counted and given back when it goes, however it goes. Memory that was lent
to it is kept as it is until it has closed its end of the connection: until then it may be reading.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import socket
import struct
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from tierloom.pipeline.serve.cuts import AHEAD, given_part
from tierloom.pipeline.serve.handing_over import hand_over
from tierloom.pipeline.serve.object_store import MemoryReservation, ObjectStore
from tierloom.pipeline.serve.own_tiers import OwnTiers
from tierloom.pipeline.serve.terms import Lending, Terms
from tierloom.stages.errors import ArenaFull, BadObject, Lost, TierDown
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.contract.concurrently import map_concurrently
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.connection import Connection
from tierloom.stages.tiers.server.protocol import ErrorCode, Kind

if TYPE_CHECKING:
    from tierloom.pipeline.serve.landings import Landings

log = logging.getLogger("tierloom.serve")


class _Refuse(Exception):
    """The client is told why, and the connection is closed."""

    def __init__(self, why: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.why = why


class Session:
    """Owns the connection until `serve` returns."""

    def __init__(
        self, connection: Connection, store: ObjectStore | OwnTiers, terms: Terms,
        lending: Lending,
    ) -> None:  # fmt: skip
        self._connection, self._store = connection, store
        self._terms, self._lending = terms, lending
        self._space = b""
        self._shares = False
        self._landings: Landings | None = None
        self._loans: dict[int, Lease] = {}
        self._lent = self._last = 0
        self._resting: anyio.CancelScope | None = None
        self._ending = False
        self.welcomed = False
        self.gone = False
        """Nothing is answered any more; loans may still be out."""

    def end(self) -> None:
        """Go, as soon as what is under way is done."""
        self._ending = True
        if self._resting is not None:
            self._resting.cancel()

    async def serve(self, hello: float) -> None:
        """Until the client goes, or is sent away. `hello`: seconds it may take to say who it is."""
        number = 0
        try:
            with anyio.fail_after(hello):
                await self._connection.handshake()
                await self._welcome()
            while not self._ending:
                with anyio.CancelScope() as resting:
                    self._resting = resting
                    there = await self._connection.readable()
                self._resting = None
                if resting.cancelled_caught:
                    break
                if there:  # it did not wait for its answer, or is very quick: others first
                    await anyio.lowlevel.checkpoint()
                message = await self._connection.message()
                number = message.number
                await self._answer(message)
            if self.welcomed:
                await self._refuse(number, ErrorCode.DRAINING, "the server is going")
        except wire.BadMessage as error:
            await self._refuse(number, ErrorCode.MALFORMED, str(error))
        except _Refuse as error:
            await self._refuse(number, error.why, str(error))
        except (OSError, TimeoutError, TierDown) as error:
            log.debug("client gone: %r", error)
        except Exception:
            log.exception("a client's message broke the session")
            await self._refuse(number, ErrorCode.BROKEN, "the server failed; its log says how")
        finally:
            await self._leave()

    async def _refuse(self, number: int, why: ErrorCode, text: str) -> None:
        """Say why, if the client still listens."""
        if why is not ErrorCode.DRAINING:
            log.warning("client refused: %s", text)
        with contextlib.suppress(OSError, TimeoutError), anyio.move_on_after(1):
            await self._connection.send(
                wire.message(Kind.ERROR, number, wire.pack_error(why, text))
            )

    async def _leave(self) -> None:
        """Close; with loans out, first wait until the client has: it may be reading them."""
        self.gone = True
        if self._landings is not None:
            self._landings.close()
        try:
            if self._loans:
                with contextlib.suppress(OSError):
                    self._connection.sock.shutdown(socket.SHUT_WR)
                await self._gone()
                for lease in self._loans.values():
                    lease.release()
                self._lending.nbytes -= self._lent
                self._loans.clear()
        finally:
            self._connection.close()

    async def _gone(self) -> None:
        """Until the client has closed its end: by will, or because it died."""
        waste = bytearray(4096)
        with contextlib.suppress(OSError):
            while True:
                await anyio.wait_readable(self._connection.sock)
                if not self._connection.sock.recv_into(waste):
                    return

    async def _welcome(self) -> None:
        """Who is there, and does it know the token?"""
        nonce, token = secrets.token_bytes(wire.NONCE), self._terms.token
        greeting = wire.Greeting(wire.VERSION, wire.VERSION, bool(token), self._terms.epoch, nonce)
        await self._connection.send(wire.message(Kind.GREETING, 0, wire.pack(greeting)))
        message = await self._connection.message(wire.FIRST)
        if message.kind is not Kind.HELLO:
            raise wire.BadMessage(f"{message.kind.name} came where HELLO was due")
        hello = wire.unpack(wire.Hello, message.body)
        if hello.version != wire.VERSION:
            raise _Refuse(ErrorCode.VERSION, f"this server speaks version {wire.VERSION} only")
        said = (self._terms.epoch, nonce, hello.nonce, hello.namespace)
        if token and not hmac.compare_digest(hello.proof, wire.proof(token, b"client", *said)):
            raise _Refuse(ErrorCode.TOKEN, "wrong token")
        self._space = hello.namespace
        fd = self._store.arena.fd
        shares = hello.flags & wire.MEMORY and fd >= 0 and self._store.kept_in_memory
        self._shares = bool(shares) and self._is_ours()
        sender = self._terms.sender if hello.flags & wire.LANDS else None
        if sender is not None:
            from tierloom.pipeline.serve.landings import Landings

            self._landings = Landings(
                self._connection, self._store, self._terms, sender, self._space, b"".join(said)
            )
        flags = wire.MEMORY * self._shares + wire.LANDS * (sender is not None)
        flags += wire.DIRECTORY * (self._terms.host is not None)
        flags += wire.TELLS_RANKS * isinstance(self._store, OwnTiers)
        flags += wire.OFFERS * self._store.takes_offers
        welcome = wire.Welcome(
            flags, wire.proof(token, b"server", *said),
            self._terms.window, self._store.largest,
            self._store.arena.total if self._shares else 0,
        )  # fmt: skip
        words = wire.message(Kind.WELCOME, message.number, wire.pack(welcome))
        if self._shares:  # fits into an empty buffer: it does not block
            socket.send_fds(self._connection.sock, [words], [fd])
        else:
            await self._connection.send(words)
        self.welcomed = True

    def _is_ours(self) -> bool:
        """The other end is a process of our own user: it could read this memory anyway."""
        sock = self._connection.sock
        if sock.family != socket.AF_UNIX:
            return False
        record = struct.Struct("3i")
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, record.size)
        return int(record.unpack(raw)[1]) == os.getuid()

    async def _answer(self, message: wire.Message) -> None:
        kind, number, body = message
        if kind is Kind.HAS:
            found = await self._store.exists(self._space, wire.keys_of(body))
            codes = bytes([wire.DONE if there else Lost.ABSENT for there in found])
            await self._connection.send(wire.message(Kind.HAD, number, codes))
        elif kind is Kind.GET:
            await self._get(number, wire.unpack_all(wire.Wanted, body, wire.OBJECTS))
        elif kind is Kind.PUT:
            await self._put(number, wire.unpack_all(wire.Offer, body, wire.OBJECTS))
        elif kind is Kind.BORROW:
            await self._lend(number, wire.keys_of(body, wire.OBJECTS))
        elif kind in (Kind.AGENT, Kind.LAND, Kind.ABORT) and self._landings is not None:
            await self._landings.answer(message)
        elif kind is Kind.SETTLE:
            await self._store.order_for_eviction(self._space, wire.keys_of(body))
        elif kind in (Kind.TAKE, Kind.OFFER, Kind.RANKS) and isinstance(self._store, OwnTiers):
            limit = self._terms.limit
            await hand_over(self._connection, message, self._store, self._space, limit)
        elif kind is Kind.RETURN:
            self._take_back(wire.ids_of(body))
        elif kind is Kind.DROP:
            await self._holds(number, await self._store.delete(self._space, wire.keys_of(body)))
        elif kind in (Kind.CLEAR, Kind.STAT, Kind.PING):
            if body:
                raise wire.BadMessage(f"{kind.name} has no body")
            if kind is Kind.PING:
                await self._connection.send(wire.message(Kind.PONG, number))
            else:
                clears = kind is Kind.CLEAR
                count = await self._store.clear(self._space) if clears else 0
                await self._holds(number, count)
        elif self._terms.host is not None and (told := await self._terms.host.answer(message)):
            await self._connection.send(told)
        else:
            raise wire.BadMessage(f"{kind.name} is not a question")

    async def _holds(self, number: int, count: int) -> None:
        await self._connection.send(wire.message(Kind.HOLDS, number, self._holdings(count)))

    def _holdings(self, count: int) -> bytes:
        stat = self._store.stat(self._space)
        return wire.pack(wire.Holdings(count, *stat, self._store.evicted))

    async def _get(self, number: int, wanted: list[wire.Wanted]) -> None:
        """Read a few objects at once, send them one after another."""
        for begin in range(0, len(wanted), AHEAD):
            part = wanted[begin : begin + AHEAD]
            with self._store.reservation() as reservation:
                keys = [asked.key for asked in part]
                objects: list[Object | Lost] = [Lost.NO_ROOM] * len(keys)
                if not self._terms.limit.exceeded:  # else no disk is read for nothing
                    room = await self._store.make_room(self._space, reservation, keys)
                    read = partial(self._store.read, self._space, reservation, room=room)
                    objects = await map_concurrently(read, keys, AHEAD)
                for asked, obj in zip(part, objects, strict=True):
                    item, data = given_part(asked, obj)
                    if len(data) and not await self._terms.limit.wait(len(data)):
                        item, data = given_part(asked, Lost.NO_ROOM)
                    head = wire.message(Kind.ITEM, number, wire.pack(item))
                    leases = () if isinstance(obj, Lost) else (obj.lease,)
                    await self._connection.send(head, data, leases=leases)

    async def _put(self, number: int, offers: list[wire.Offer]) -> None:
        """Say which objects are wanted, receive them, and keep each when it is whole."""
        there = await self._store.exists(self._space, [key for key, _ in offers])
        with self._store.reservation() as reservation:
            codes, leases = await self._make_room(offers, there, reservation)
            await self._connection.send(wire.message(Kind.GRANT, number, bytes(codes)))
            for i, lease in enumerate(leases):
                if lease is not None:
                    key, nbytes = offers[i]
                    await self._connection.fill(lease.view[:nbytes], leases=(lease,))
                    codes[i] = await self._keep(key, nbytes, lease)
        await self._connection.send(
            wire.message(Kind.KEPT, number, bytes(codes) + self._holdings(0))
        )

    async def _make_room(
        self, offers: list[wire.Offer], there: list[bool], reservation: MemoryReservation
    ) -> tuple[list[int], list[Lease | None]]:
        """A code for each, and a lease for those that are to be sent."""
        codes, leases, total = [], [], 0
        most = self._store.largest if self._store.writable else 0
        for (_, nbytes), kept in zip(offers, there, strict=True):
            code = wire.SEND
            if kept:
                code = wire.DONE
            elif nbytes % PAGE or nbytes < PAGE:
                code = Lost.CORRUPT
            elif nbytes > most or (total and total + nbytes > self._terms.window):
                code = Lost.NO_ROOM
            total += nbytes if code == wire.SEND else 0
            codes.append(code)
        room = await reservation.promise(total)
        for i, (_, nbytes) in enumerate(offers):
            lease = None
            if codes[i] == wire.SEND:
                try:
                    lease = reservation.lease(nbytes) if room else None
                except ArenaFull:
                    lease = None
                if lease is not None:
                    reservation.take(lease)
                else:
                    codes[i] = Lost.NO_ROOM
            leases.append(lease)
        return codes, leases

    async def _keep(self, key: bytes, nbytes: int, lease: Lease) -> int:
        """Check what came, and put it; until then nobody has seen it."""
        try:
            header = Header.unpack(lease.view[:nbytes], key=key, namespace=self._space)
        except BadObject as error:
            log.warning("bad object refused: %s", error)
            return Lost.CORRUPT
        if header.nbytes != nbytes:
            log.warning("bad object refused: %d bytes, not %d", nbytes, header.nbytes)
            return Lost.CORRUPT
        obj = Object(header, lease, loaded=len(header.frames), sealed=True)
        return await self._store.put(self._space, obj) or wire.DONE

    async def _lend(self, number: int, keys: list[bytes]) -> None:
        """Lease objects to the client, where they are; what cannot be lent it gets by GET."""
        if not self._shares:
            raise wire.BadMessage("BORROW without shared memory")
        loans = []
        for key in keys:
            with self._store.reservation() as reservation:
                room = await self._store.make_room(self._space, reservation, [key])
                obj = await self._store.read(self._space, reservation, key, room=room)
                loans.append(self._loan(obj))
        await self._connection.send(wire.message(Kind.LENT, number, wire.pack(*loans)))

    def _loan(self, obj: Object | Lost) -> wire.Loan:
        if isinstance(obj, Lost):
            return wire.Loan(obj, 0, 0, 0)
        lease, most = obj.lease, self._lending.most
        small = self._lent + lease.nbytes <= self._terms.lends
        if not lease.kept or not small or self._lending.nbytes + lease.nbytes > most:
            return wire.Loan(wire.BYTES, 0, 0, 0)
        self._last += 1
        self._loans[self._last] = lease.retain()
        self._lent += lease.nbytes
        self._lending.nbytes += lease.nbytes
        return wire.Loan(wire.DONE, self._last, lease.offset, obj.header.nbytes)

    def _take_back(self, ids: list[int]) -> None:
        for id in ids:
            lease = self._loans.pop(id, None)
            if lease is None:
                raise wire.BadMessage(f"loan {id} was never made, or given back before")
            self._lent -= lease.nbytes
            self._lending.nbytes -= lease.nbytes
            lease.release()
