"""server: objects in a store of tierloom's own that many engines share, kept by `tierloom serve`.

    cold: {use: server, url: "tierloom://cache.local:7654", timeout: 250 ms}

`tierloom+tls://HOST:PORT` is the same over TLS, `tierloom+unix:///PATH` a server on this host,
whose memory is mapped: a read is then a lease of it, and nothing is copied. docs/protocol.md
describes the protocol. Each connection carries one request at a time, and one that was interrupted
is closed, so nothing writes into memory after a read was cancelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from tierloom.stages.errors import ArenaFull, ConfigError, Damaged, Lost
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.contract.object_reader import ObjectReader, ReadingTier
from tierloom.stages.tiers.contract.tier import Read, TierContext, TierStat, require_sealed
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.client import Client, Rejected, address_of, refuse
from tierloom.stages.tiers.server.connection import Connection

T = TypeVar("T")

_WHOLE = 0xFFFFFFFF
_NOTHING = wire.Holdings(0, 0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """Options of a tier on a tierloom server."""

    url: str
    """`tierloom://HOST:PORT`, `tierloom+tls://HOST:PORT` or `tierloom+unix:///PATH`."""
    token_file: str = ""
    """File with the server's token. Default: the environment variable TIERLOOM_TOKEN, if set."""
    ca_file: str = ""
    """PEM file of the certificate authorities to trust. Default: the system's."""
    connections: int = 8
    """Most concurrent requests, each on a connection of its own."""
    share: bool = True
    """Map the memory of a server on this host, if it allows that, instead of copying."""

    def __post_init__(self) -> None:
        address_of(self.url)
        if self.connections < 1:
            raise ValueError(f"connections must be at least 1, got {self.connections}")

    @property
    def encrypted(self) -> bool:
        return address_of(self.url).tls


class Server(ReadingTier):
    """Whole chunks only. The namespace belongs to the connection: objects of other namespaces under
    the same keys are never seen."""

    Options = ServerOptions

    def __init__(self, options: ServerOptions, ctx: TierContext) -> None:
        super().__init__(ctx)
        self.options = options
        # A device reads only the memory that was registered with it.
        shares = options.share and not ctx.arena.pinned
        self._client = Client(address_of(options.url), ctx.namespace, self._anew, share=shares)
        self._number = 0
        self._holds = _NOTHING
        self._unsettled: list[bytes] = []

    async def open(self) -> None:
        """Connect once. Raises ConfigError if it can never work, TierDown, OSError."""
        if not self.ctx.namespace:
            raise ConfigError("server: this tier needs a namespace")
        self._client.prepare(
            self.options.token_file, self.options.ca_file, self.options.connections
        )
        try:
            await self._ask(wire.Kind.STAT)
        except Rejected as error:
            raise ConfigError(f"{self.options.url}: {error}") from None

    async def close(self) -> None:
        self._client.close()

    def order_for_eviction(self, keys: Sequence[bytes]) -> None:
        """Sent to the server with the next request."""
        self._unsettled = [*keys, *self._unsettled][: wire.KEYS]

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        found: list[bool] = []
        for part in _parts(keys, wire.KEYS):
            answer = await self._exchange(wire.Kind.HAS, b"".join(part), wire.Kind.HAD)
            found += [code == wire.DONE for code in wire.codes_of(answer, len(part))]
        return found

    async def read(self, reads: Sequence[Read]) -> None:
        readers: list[ObjectReader] = []
        for part in _parts(reads, wire.OBJECTS):
            left = await self._borrow(part, readers) if self._client.shares else part
            if left:
                await self._fetch(left, readers)
        for reader in readers:
            if reader.proof is not None:
                await self.expel(reader.read.key, reader.proof, reader.seen)

    async def _head(self, key: bytes, nbytes: int) -> bytes:
        asked = wire.Wanted(key, 0, 0, 0)
        async with self._client.connection() as connection:
            number = await self._send(connection, wire.Kind.GET, wire.pack(asked))
            body = await self._answer(connection, number, wire.Kind.ITEM)
            item = wire.item_of(body, asked, self._client.welcome.largest)
            if item.code:
                raise FileNotFoundError(key.hex())
            head = bytearray(min(nbytes, item.end))
            await connection.fill(memoryview(head))
            await connection.skip(item.end - len(head))
        return bytes(head)

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        require_sealed(*objects)
        codes: list[int] = []
        part: list[Object] = []
        nbytes = 0
        for obj in reversed(objects):  # so that the prompt's head is the last to go
            nbytes += obj.header.nbytes
            if part and (nbytes > self._client.welcome.window or len(part) == wire.OBJECTS):
                codes += await self._offer(part)
                part, nbytes = [], obj.header.nbytes
            part.append(obj)
        if part:
            codes += await self._offer(part)
        lost = [Lost(code) if code else None for code in reversed(codes)]
        self.counts.refused += sum(code is not None for code in lost)
        return lost

    async def delete(self, keys: Sequence[bytes]) -> int:
        dropped = 0
        for part in _parts(keys, wire.KEYS):
            dropped += await self._ask(wire.Kind.DROP, b"".join(part))
        return dropped

    async def clear(self) -> int:
        return await self._ask(wire.Kind.CLEAR)

    def stat(self) -> TierStat:
        """As of the last reply of the server; others change it too."""
        return TierStat(self._holds.objects, self._holds.nbytes, self._holds.capacity)

    async def _borrow(self, reads: Sequence[Read], readers: list[ObjectReader]) -> list[Read]:
        """Lease what the server lends; returns the reads whose bytes must be fetched."""
        fresh = [read for read in reads if read.object is None]
        left = [
            r for r in reads if r.object is not None and r.object.loaded < _frames(r.object, r.upto)
        ]
        if not fresh:
            return left
        shared_memory = await self._client.shared_memory()
        if shared_memory is None:
            return [*left, *fresh]
        from tierloom.stages.tiers.server.shared_memory import SharedLease

        loans = await shared_memory.borrow([read.key for read in fresh])
        leases = [
            None if loan.code else SharedLease(shared_memory, loan) for loan in loans
        ]  # at once, all
        for read, loan, lease in zip(fresh, loans, leases, strict=True):
            if lease is not None:
                with ObjectReader(read, self.ctx.arena, self.counts) as reader:
                    self._judge(reader, reader.own(lease), None)
                readers.append(reader)
            elif loan.code == wire.BYTES:
                left.append(read)
            else:
                self._miss(read, loan.code)
        return left

    async def _fetch(self, reads: Sequence[Read], readers: list[ObjectReader]) -> None:
        """Receive each object's wanted bytes into its lease."""
        wanted = []
        for read in reads:
            held = read.object
            first, nbytes = (held.loaded, held.header.nbytes) if held is not None else (0, 0)
            upto = _frames(held, read.upto) if held is not None else min(read.upto, _WHOLE)
            wanted.append(wire.Wanted(read.key, first, max(upto, first), nbytes))
        async with self._client.connection() as connection:
            number = await self._send(connection, wire.Kind.GET, wire.pack(*wanted))
            for read, asked in zip(reads, wanted, strict=True):
                body = await self._answer(connection, number, wire.Kind.ITEM)
                item = wire.item_of(body, asked, self._client.welcome.largest)
                if item.code:
                    self._miss(read, item.code)
                elif read.object is None:
                    await self._first(connection, read, item, readers)
                else:
                    await self._further(connection, read, asked, item)

    async def _first(
        self, connection: Connection, read: Read, item: wire.Item, readers: list[ObjectReader]
    ) -> None:
        """An object's header and first frames, into a new lease."""
        with ObjectReader(read, self.ctx.arena, self.counts) as reader:
            try:
                lease = reader.lease(item.nbytes)
            except ArenaFull:
                await connection.skip(item.end)
                raise
            await connection.fill(lease.view[: item.end], leases=(lease,))
            self._judge(reader, lease, item)
        readers.append(reader)

    async def _further(
        self, connection: Connection, read: Read, asked: wire.Wanted, item: wire.Item
    ) -> None:
        """More frames of an object whose first have come."""
        with ObjectReader(read, self.ctx.arena, self.counts) as reader:
            held = reader.held
            assert held is not None
            boundaries = held.header.boundaries
            if (item.begin, item.end) != (boundaries[asked.first], boundaries[asked.upto]):
                raise wire.BadMessage("other frames came than were requested")
            await connection.fill(held.lease.view[item.begin : item.end], leases=(held.lease,))
            reader.deliver(held.header, asked.upto)

    def _judge(self, reader: ObjectReader, lease: Lease, item: wire.Item | None) -> None:
        """Deliver an object, unless its header is not what it should be: then raise BadObject.
        Without `item` it is borrowed, and all of it is there."""
        there = lease.view[: item.end if item is not None else lease.nbytes]
        reader.seen = bytes(there[:PAGE])
        header = Header.unpack(there, key=reader.read.key, namespace=self.ctx.namespace)
        loaded = len(header.frames)
        if item is not None:
            loaded = min(reader.read.upto, loaded)
        wrong = item is not None and item.end != header.boundaries[loaded]
        if header.nbytes != lease.nbytes or wrong:
            raise Damaged("its length contradicts its header")
        reader.deliver(header, loaded)

    def _miss(self, read: Read, code: int) -> None:
        """Where it is CORRUPT, the server has seen it, and dropped it."""
        ObjectReader(read, self.ctx.arena, self.counts).miss(Lost(code))

    async def _offer(self, objects: Sequence[Object]) -> list[int]:
        """Offer objects, send those that the server wants; a code for each."""
        offers = [wire.Offer(obj.header.key, obj.header.nbytes) for obj in objects]
        async with self._client.connection() as connection:
            number = await self._send(connection, wire.Kind.PUT, wire.pack(*offers))
            body = await self._answer(connection, number, wire.Kind.GRANT)
            wanted = wire.codes_of(body, len(objects), also=wire.SEND)
            for obj, code in zip(objects, wanted, strict=True):
                if code == wire.SEND:
                    await connection.send(obj.lease.view[: obj.header.nbytes], leases=(obj.lease,))
            body = await self._answer(connection, number, wire.Kind.KEPT)
            codes, holds = wire.kept_of(body, len(objects))
            self._note(holds)
        for obj, asked, code in zip(objects, wanted, codes, strict=True):
            if asked == wire.SEND and not code:
                self.counts.puts += 1
                self.counts.bytes_in += obj.header.nbytes
        return codes

    async def _ask(self, kind: wire.Kind, body: bytes = b"") -> int:
        """Send a request that is answered by HOLDS; how many objects were affected."""
        holds = wire.unpack(wire.Holdings, await self._exchange(kind, body, wire.Kind.HOLDS))
        self._note(holds)
        return holds.done

    def _note(self, holds: wire.Holdings) -> None:
        if self._holds is not _NOTHING:
            self.counts.evicted += max(0, holds.evicted - self._holds.evicted)
        self._holds = holds

    def _anew(self) -> None:
        """The server was restarted: what it holds is unknown."""
        self.counts.extra["restarts"] = self.counts.extra.get("restarts", 0) + 1
        self._holds = _NOTHING

    async def _exchange(self, kind: wire.Kind, body: bytes, wanted: wire.Kind) -> bytes:
        async with self._client.connection() as connection:
            return await self._answer(connection, await self._send(connection, kind, body), wanted)

    async def _send(self, connection: Connection, kind: wire.Kind, body: bytes) -> int:
        self._number = (self._number + 1) & 0xFFFFFFFF
        number, hint = self._number, b""
        if self._unsettled:
            hint = wire.message(wire.Kind.SETTLE, 0, b"".join(self._unsettled))
            self._unsettled = []
        await connection.send(hint + wire.message(kind, number, body))
        return number

    async def _answer(self, connection: Connection, number: int, wanted: wire.Kind) -> bytes:
        message = await connection.message()
        refuse(message, wanted)
        if message.number != number:
            raise wire.BadMessage("a reply to another request")
        return message.body


def _frames(held: Object, upto: int) -> int:
    return min(upto, len(held.header.frames))


def _parts(things: Sequence[T], most: int) -> list[Sequence[T]]:
    return [things[i : i + most] for i in range(0, len(things), most)]
