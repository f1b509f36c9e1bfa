"""Reads from Redis under way: what each still needs, and where it lands."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tierloom.stages.errors import ArenaFull, BadObject, Damaged, Lost, Unreadable
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.contract.concurrently import fan
from tierloom.stages.tiers.contract.tier import Read, TierContext, TierCounts
from tierloom.stages.tiers.disk.store import cuts_of
from tierloom.stages.tiers.redis.connection import Connection, Lanes
from tierloom.stages.tiers.redis.manifest import MANIFEST, Manifest, unpack_whole
from tierloom.stages.tiers.redis.resp import Answer, Refusal
from tierloom.stages.tiers.redis.topology import Node

_TURN = 8  # pieces after which a connection is left to another call that waits for one


class Piece(NamedTuple):
    """Bytes `begin` to `stop` of an object, all within one piece of it."""

    load: Load
    number: int
    begin: int
    stop: int


class Load:
    """One read. Owns a lease of its own making until it is delivered."""

    def __init__(self, read: Read, ctx: TierContext, counts: TierCounts) -> None:
        self.read, self._ctx, self._counts = read, ctx, counts
        self.lost: Lost | None = None
        self.why: BadObject | None = None
        self.proof: Damaged | None = None
        """What is there of it is of no use to anybody: to be dropped."""
        self.raw = b""
        """What the manifest begins with."""
        self.manifest: Manifest | None = None
        self.pieces: list[Piece] = []
        """What is to be fetched."""
        held = read.object
        self._lease: Lease | None = held.lease if held is not None else None
        self._header: Header | None = None
        self._open = 0

    @property
    def due(self) -> bool:
        """Something has to be loaded."""
        return self.read.object is None or self.read.upto > self.read.object.loaded

    @property
    def whole(self) -> bool:
        """All that was wanted is there."""
        return self.lost is None and self._header is not None and not self._open

    def plan(self, name: bytes, raw: Answer) -> None:
        """Read the manifest, take the memory, and list the pieces; or lose it."""
        held = self.read.object
        if raw is None:
            return self._lose(Lost.ABSENT)
        if not isinstance(raw, bytes):
            return self._refuse(Unreadable(Lost.FOREIGN, "a value that is no string"))
        self.raw = raw[:MANIFEST]
        try:
            manifest, header = unpack_whole(
                name, raw, key=self.read.key, namespace=self._ctx.namespace
            )
        except BadObject as error:
            return self._refuse(error)
        if held is not None and held.header != header:  # another took its place meanwhile
            return self._lose(Lost.ABSENT)
        if self._lease is None:
            try:
                self._lease = self._ctx.arena.lease(header.nbytes)
            except ArenaFull:
                return self._lose(Lost.NO_ROOM)
            self._lease.view[: header.header_bytes] = memoryview(raw)[MANIFEST:]
        self.manifest, self._header = manifest, header
        cuts, upto = cuts_of(header), min(self.read.upto, len(header.frames))
        begin = cuts[held.loaded if held is not None else 0]
        # Never a byte of a frame that was loaded before: it may be in use.
        self.pieces = [Piece(self, *cut) for cut in manifest.cuts(begin, cuts[upto])]
        self._open = len(self.pieces)
        return None

    def ask(self, piece: Piece) -> tuple[bytes, Lease, int, int]:
        """The command for a piece, and where it lands."""
        assert self.manifest is not None
        assert self._lease is not None
        return self.manifest.ask(*piece[1:]), self._lease, piece.begin, piece.stop

    def took(self, piece: Piece, got: Answer) -> None:
        """A piece has come, or has not."""
        if got == piece.stop - piece.begin:
            self._open -= 1
        elif not got and self.lost is None:  # evicted; a part of nothing is empty
            self._counts.extra["torn"] = self._counts.extra.get("torn", 0) + 1
            self._lose(Lost.ABSENT)
            self.proof = Damaged("a piece of it was evicted")
        elif self.lost is None:
            self._refuse(Damaged("a piece of it is of another length"))

    def fail(self) -> None:
        """Its server failed; what had come whole stays."""
        if self.due and not self.whole and self.lost is None:
            self.lost = Lost.TIER_DOWN

    def deliver(self) -> None:
        """Tell the reader. No memory may be written any more."""
        read, header = self.read, self._header
        if self.lost is not None or header is None or self._lease is None:
            read.lost, read.why = self.lost, self.why
            return
        if read.object is None:
            self._counts.hits += 1
            read.object = Object(header, self._lease)
        held, cuts, upto = read.object, cuts_of(header), min(read.upto, len(header.frames))
        self._counts.bytes_out += cuts[upto] - (cuts[held.loaded] if held.loaded else 0)
        held.loaded = upto
        held.sealed = upto == len(header.frames)

    def close(self) -> None:
        """Give the memory back, where it is nobody's."""
        if self._lease is not None and self.read.object is None:
            self._lease.release()
        self._lease = None

    def _lose(self, code: Lost) -> None:
        self.lost = code
        self._counts.misses += code is Lost.ABSENT
        self._counts.corrupt += code is Lost.CORRUPT

    def _refuse(self, error: BadObject) -> None:
        self.why = error
        self.proof = error if isinstance(error, Damaged) else None
        self._lose(error.lost)


async def carry(
    node: Node, loads: Sequence[Load], window: int, trouble: Callable[[Refusal], Exception]
) -> None:
    """Fetch all pieces, the first of each object first, on the connections that are free.

    However it ends, no byte lands afterwards. Raises what `trouble` makes of a refusal.
    """
    jobs = deque(sorted((p for load in loads for p in load.pieces), key=lambda p: p.number))
    lanes = node.bulk

    async def worker(_: int) -> None:
        while jobs:
            async with lanes.lane() as lane:
                await _stream(lanes, lane, jobs, window, trouble)

    if jobs:
        count = max(1, min(lanes.free, -(-len(jobs) // window)))
        await fan(worker, range(count), count)


async def _stream(
    lanes: Lanes, lane: Connection, jobs: deque[Piece], window: int,
    trouble: Callable[[Refusal], Exception],
) -> None:  # fmt: skip
    """Fetch pieces over one connection, `window` at once, until there are none, or it is somebody
    else's turn, or the connection had to be given up for a piece that was too long."""
    under_way: deque[tuple[Piece, asyncio.Future[list[Answer]]]] = deque()
    taken = 0
    while True:
        mine = lane.error is None and (taken < _TURN or not lanes.wanted)
        if jobs and mine and len(under_way) < window:
            piece = jobs.popleft()
            if piece.load.lost is None:
                under_way.append((piece, lane.fetch(*piece.load.ask(piece))))
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
        if isinstance(got, Refusal) and got.code != "WRONGTYPE":
            raise trouble(got)
        piece.load.took(piece, got)
