"""Arrival: objects that come piece by piece, each shown once it is whole and proved.

A piece follows the last one of its object, and the one with the header comes last. An object is
shown when its header and every frame of it are right, and its links are those of the prompt.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack

import anyio

from tierloom.pipeline.run.threads import Pool
from tierloom.stages.errors import ArenaFull, BadObject, Damaged, Lost, TierDown
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.memory.arena import Arena, Lease
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.client import refuse
from tierloom.stages.tiers.server.connection import Connection
from tierloom.stages.tiers.server.taking import PieceHead

_SLICE = 4 << 20
"""Bytes, each of which must come within the time that is left to a piece."""


Keep = Callable[[int, Object], Awaitable[Lost | None]]
"""Takes an object that came whole, with the number of its chunk; why it is not kept, None: it is.
Raises BadObject."""


class Arrival:
    """The objects of one hand-off, piece by piece. Owns their leases until `close`, so that none is
    evicted for a later one of the same prompt."""

    def __init__(
        self, chunks: Sequence[bytes], namespace: bytes, keep: Keep, arena: Arena, *,
        largest: int, pool: Pool,
    ) -> None:  # fmt: skip
        """`chunks`: grain links of each, from the head of the prompt on. `largest`: bytes of an
        object, at most."""
        self._chunks, self._namespace, self._keep = chunks, namespace, keep
        self._arena, self._pool, self._largest = arena, pool, largest
        self._leases = ExitStack()
        self._parts: dict[int, tuple[Lease, int, int]] = {}
        """Of objects of which some has come: the lease, where the first piece began, and where the
        last ended."""
        self.kept: list[bytes] = []
        self.nbytes = 0
        """Bytes that have come."""

    async def receive(self, connection: Connection, number: int, wait: float) -> None:
        """Until all has been said of each. Raises TimeoutError where nothing comes for `wait`
        seconds, OSError, TierDown; what came whole before that is kept."""
        left = set(range(len(self._chunks)))
        while left:
            with anyio.fail_after(wait):
                message = await connection.message()
            refuse(message, wire.Kind.PIECE)
            if message.number != number:
                raise wire.BadMessage("a reply to another question")
            piece = PieceHead.unpack(message.body, len(self._chunks), self._largest)
            if piece.chunk not in left:
                raise wire.BadMessage("a piece of what has come already")
            if piece.code:
                left.discard(piece.chunk)
                continue
            lease = self._place(piece)
            for at in range(piece.begin, piece.end, _SLICE):
                with anyio.fail_after(wait):
                    end = min(at + _SLICE, piece.end)
                    await connection.fill(lease.view[at:end], leases=(lease,))
            self.nbytes += piece.end - piece.begin
            if piece.begin == 0:
                left.discard(piece.chunk)
                await self._whole(piece, lease)

    def close(self) -> None:
        self._leases.close()

    def _place(self, piece: PieceHead) -> Lease:
        """The lease for a piece, which must follow the last one. Raises TierDown."""
        if piece.chunk not in self._parts:
            try:
                lease = self._arena.lease(piece.nbytes)
            except ArenaFull as error:
                raise NoRoom(str(error)) from None
            self._leases.callback(lease.release)
            self._parts[piece.chunk] = lease, piece.begin, piece.begin
        lease, first, upto = self._parts[piece.chunk]
        begins = piece.begin == 0 and (upto == piece.nbytes or first == 0)
        fits = piece.nbytes == lease.nbytes and (begins or piece.begin == upto)
        if not fits or (piece.begin == 0 and piece.end != (first or piece.nbytes)):
            raise wire.BadMessage("a piece that does not follow the last one of its object")
        self._parts[piece.chunk] = lease, first, piece.end if piece.begin else upto
        return lease

    async def _whole(self, piece: PieceHead, lease: Lease) -> None:
        """Keep an object, if it is what was asked for. Raises BadMessage."""
        links = self._chunks[piece.chunk]
        try:
            header = Header.unpack(lease.view, namespace=self._namespace)
            if header.nbytes != lease.nbytes or not header.links.startswith(links):
                raise Damaged("its length or its links are not those of the prompt")
            bad = await self._pool(_damaged, header, lease, leases=(lease,))
            if bad >= 0:
                raise Damaged(f"frame {bad} does not match its checksum")
            obj = Object(header, lease, loaded=len(header.frames), sealed=True)
            if await self._keep(piece.chunk, obj) is None:
                self.kept.append(header.key)
        except BadObject as error:
            raise wire.BadMessage(f"an object of no use: {error}") from None


class NoRoom(TierDown):
    """Other objects have taken the memory that this one needs."""


def _damaged(header: Header, lease: Lease) -> int:
    """The first frame that does not match its checksum; -1: all do. Frees the GIL."""
    from tierloom.triton_kernels.checksum.xxh3_cpu import xxh3_64

    for i, f in enumerate(header.frames):
        if xxh3_64(lease.at(f.offset, f.stored), f.stored) != f.checksum:
            return i
    return -1
