"""infinistore: the memory of an InfiniStore server, over TCP.

    cold: {use: infinistore, url: "infinistore://10.0.0.1:12345"}

The server shows a value before its last byte has come, and crashes if it is asked for then; it also
crashes if a reader disconnects in the middle. So pieces are small, have names that
nobody else writes, and are read to their end even when nobody waits any more. It cannot list what
it holds: `clear` gives the namespace a new name there, and what is old falls out in time.
"""

from __future__ import annotations

import ctypes
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tierloom.stages.errors import Lost
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.options import Seconds, Size
from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.pools.infinistore_protocol import InfinistoreConnection
from tierloom.stages.tiers.pools.manifest import Piece
from tierloom.stages.tiers.pools.tier import Pooled

_SMALL = 1 << 20  # what is longer is neither a manifest nor a header
_NAME = 16  # hex digits under which all that is ours is kept until `clear`


@dataclass(frozen=True, kw_only=True, slots=True)
class InfinistoreOptions:
    """Options of an InfiniStore tier."""

    url: str
    """The server, as in `infinistore://host:port`; a query is ignored."""
    piece: Size = 1 << 20
    """Most bytes of a value; larger ones are slower."""
    deadline: Seconds = 2.0
    """Most time of one call, its thread included; the connection is closed after that."""
    threads: int = 2
    """Most concurrent calls, each on a connection of its own."""

    def __post_init__(self) -> None:
        Address.parse(self.url, "infinistore")
        if self.threads < 1 or self.deadline <= 0:
            raise ValueError("threads and deadline must be positive")
        if self.piece < PAGE or self.piece % PAGE:
            raise ValueError(f"piece must be a multiple of {PAGE} bytes, got {self.piece}")


class Infinistore(Pooled):
    """Speaks the protocol itself (`infinistore_protocol.py` says why). TCP only: no RDMA yet."""

    Options = InfinistoreOptions

    def __init__(self, options: InfinistoreOptions, ctx: TierContext) -> None:
        super().__init__(ctx, threads=options.threads, piece=options.piece)
        self.options = options
        self._server = Address.parse(options.url, "infinistore")
        self._root = f"tierloom/{ctx.namespace.hex()[:32] or 'any'}"
        self._idle: list[InfinistoreConnection] = []
        self._closed = False

    async def open(self) -> None:
        await self._calls(self._exists, [], leases=())

    async def close(self) -> None:
        self._closed = True
        await self._calls.idle(2 * self.options.deadline)
        self._hang_up()

    # What follows runs in the pool's threads.

    def _exists(self, names: Sequence[str]) -> list[bool]:
        with self._link() as (link, base):
            return [link.exists(base + name) for name in names]

    def _peek(self, names: Sequence[str]) -> list[bytes | None]:
        with self._link() as (link, base):
            return [link.read(base + name, _SMALL) for name in names]

    def _fetch(self, pieces: Sequence[Piece]) -> list[Lost | None]:
        found: list[Lost | None] = []
        with self._link() as (link, base):
            for piece in pieces:
                came = link.read_into(base + piece.name, _view(piece))
                found.append(None if came else Lost.ABSENT if came is None else Lost.CORRUPT)
        return found

    def _store(self, pieces: Sequence[Piece]) -> list[Lost | None]:
        with self._link() as (link, base):
            kept = [link.put(base + piece.name, _view(piece)) for piece in pieces]
        return [None if one else Lost.NO_ROOM for one in kept]

    def _commit(self, manifests: dict[str, bytes]) -> list[Lost | None]:
        with self._link() as (link, base):
            kept = [link.put(base + name, value) for name, value in manifests.items()]
        return [None if one else Lost.NO_ROOM for one in kept]

    def _remove(self, names: Sequence[str]) -> list[bool]:
        with self._link() as (link, base):
            return [link.remove(base + name) for name in names]

    def _wipe(self) -> int:
        with self._link() as (link, _):
            self._rename(link)
        return self._holdings.stat.objects

    @contextmanager
    def _link(self) -> Iterator[tuple[InfinistoreConnection, str]]:
        """A connection for one call, and what names begin with. Raises TierDown, OSError."""
        end = time.monotonic() + self.options.deadline
        try:
            link = self._idle.pop()
        except IndexError:
            link = InfinistoreConnection(self._server, self.options.deadline)
        try:
            link.until(end)
            yield link, f"{self._root}/{self._name(link)}/"
        except BaseException:
            link.close()
            self._hang_up()  # a server that came back knows none of the others either
            raise
        if self._closed:
            link.close()
        else:
            self._idle.append(link)

    def _name(self, link: InfinistoreConnection) -> str:
        """The namespace's name of today; made where there is none, or where it was evicted."""
        for _ in range(2):
            raw = link.read(self._root, _NAME)
            if raw is not None and len(raw) == _NAME and raw.isalnum():
                return raw.decode()
            self._rename(link)
        raise OSError(f"infinistore: {self._root} cannot be stored: the server has no room")

    def _rename(self, link: InfinistoreConnection) -> None:
        link.remove(self._root)  # a value that is only replaced goes when the old one is evicted
        link.put(self._root, secrets.token_hex(_NAME // 2).encode())

    def _hang_up(self) -> None:
        while self._idle:
            self._idle.pop().close()


def _view(piece: Piece) -> memoryview:
    """The memory of a piece, writable; good as long as somebody holds its lease."""
    return memoryview((ctypes.c_char * piece.nbytes).from_address(piece.address)).cast("B")
