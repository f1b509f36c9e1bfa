"""Reads from Redis in progress: what each still needs, and where it lands."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from tierloom.stages.errors import ArenaFull, BadObject, Damaged, Lost, Unreadable
from tierloom.stages.kv.object import Header
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.contract.concurrently import map_concurrently
from tierloom.stages.tiers.contract.object_reader import ObjectReader
from tierloom.stages.tiers.contract.tier import Read, TierContext, TierCounts
from tierloom.stages.tiers.net.connection_pool import ConnectionPool
from tierloom.stages.tiers.redis.connection import RespConnection
from tierloom.stages.tiers.redis.manifest import MANIFEST, Manifest, unpack_whole
from tierloom.stages.tiers.redis.resp import ErrorReply, Reply
from tierloom.stages.tiers.redis.topology import RedisNode, reply_error

_TURN = 8  # pieces after which a connection is left to another call that waits for one


class PieceRead(NamedTuple):
    """Bytes `begin` to `stop` of an object, all within one piece of it."""

    load: PendingRead
    number: int
    begin: int
    stop: int


class PendingRead(ObjectReader):
    """One read, delivered when no memory is written any more. `seen` begins its manifest."""

    __slots__ = ("_header", "_namespace", "_open", "manifest", "pieces")

    def __init__(self, read: Read, ctx: TierContext, counts: TierCounts) -> None:
        super().__init__(read, ctx.arena, counts)
        self._namespace = ctx.namespace
        self.manifest: Manifest | None = None
        self.pieces: list[PieceRead] = []
        """What is to be fetched."""
        self._header: Header | None = None
        self._open = 0

    @property
    def due(self) -> bool:
        """Something has to be loaded."""
        return self.held is None or self.read.upto > self.held.loaded

    @property
    def lost(self) -> bool:
        """It does not come."""
        return self.read.lost is not None

    @property
    def whole(self) -> bool:
        """All that was wanted is there."""
        return not self.lost and self._header is not None and not self._open

    def plan(self, name: bytes, raw: Reply) -> None:
        """Read the manifest, take the memory, and list the pieces; or lose it."""
        held = self.held
        if raw is None:
            return self.miss()
        if not isinstance(raw, bytes):
            return self.refuse(Unreadable(Lost.FOREIGN, "a value that is not a string"))
        self.seen = raw[:MANIFEST]
        try:
            manifest, header = unpack_whole(name, raw, key=self.read.key, namespace=self._namespace)
        except BadObject as error:
            return self.refuse(error)
        if held is not None and held.header != header:  # another took its place meanwhile
            return self.miss()
        try:
            lease = self.lease(header.nbytes)
        except ArenaFull:
            return self.miss(Lost.NO_ROOM)
        if held is None:
            lease.view[: header.header_bytes] = memoryview(raw)[MANIFEST:]
        self.manifest, self._header = manifest, header
        # Never a byte of a frame that was loaded before: it may be in use.
        begin, end = header.boundaries[self.loaded], header.boundaries[self._upto(header)]
        self.pieces = [PieceRead(self, *part) for part in manifest.parts(begin, end)]
        self._open = len(self.pieces)
        return None

    def ask(self, piece: PieceRead) -> tuple[bytes, Lease, int, int]:
        """The command for a piece, and where it lands."""
        assert self.manifest is not None
        return self.manifest.ask(*piece[1:]), self.lease(0), piece.begin, piece.stop

    def took(self, piece: PieceRead, got: Reply) -> None:
        """A piece has come, or has not."""
        if got == piece.stop - piece.begin:
            self._open -= 1
        elif not got and not self.lost:  # evicted; a part of nothing is empty
            self._counts.extra["torn"] = self._counts.extra.get("torn", 0) + 1
            self.miss()
            self.proof = Damaged("a piece of it was evicted")
        elif not self.lost:
            self.refuse(Damaged("a piece of it is of another length"))

    def server_failed(self) -> None:
        """Its server failed; what has come whole stays."""
        if self.due and not self.whole and not self.lost:
            self.miss(Lost.TIER_DOWN)

    def finish(self) -> None:
        """Deliver what has come. No memory may be written any more."""
        if self._header is not None and not self.lost:
            self.deliver(self._header, self._upto(self._header))

    def _upto(self, header: Header) -> int:
        return max(self.loaded, min(self.read.upto, len(header.frames)))


async def fetch_pieces(node: RedisNode, loads: Sequence[PendingRead], window: int) -> None:
    """Fetch all pieces, the first of each object first, on the connections that are free.

    However it ends, no byte lands afterwards. Raises TierDown.
    """
    jobs = deque(sorted((p for load in loads for p in load.pieces), key=lambda p: p.number))

    async def worker(_: int) -> None:
        while jobs:
            async with node.bulk.connection() as connection:
                await _stream(node.bulk, connection, jobs, window)

    if jobs:
        count = max(1, min(node.bulk.free, -(-len(jobs) // window)))
        await map_concurrently(worker, range(count), count)


async def _stream(
    pool: ConnectionPool[RespConnection], connection: RespConnection, jobs: deque[PieceRead],
    window: int,
) -> None:  # fmt: skip
    """Fetch pieces over one connection, `window` at once, until there are none, or it is another
    call's turn, or the connection was closed for a piece that was too long."""
    under_way: deque[tuple[PieceRead, asyncio.Future[list[Reply]]]] = deque()
    taken = 0
    while True:
        mine = connection.error is None and (taken < _TURN or not pool.wanted)
        if jobs and mine and len(under_way) < window:
            piece = jobs.popleft()
            if not piece.load.lost:
                under_way.append((piece, connection.fetch(*piece.load.ask(piece))))
                taken += 1
            continue
        if not under_way:
            return
        piece, future = under_way.popleft()
        try:
            got = (await future)[0]
        except BadObject:
            piece.load.took(piece, -1)
            jobs.extendleft(reversed([other for other, _ in under_way]))
            return
        if isinstance(got, ErrorReply) and got.code != "WRONGTYPE":
            raise reply_error(got)
        piece.load.took(piece, got)
