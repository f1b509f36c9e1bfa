"""HandoffReceiver: KV that another engine computed for this one, fetched into this one's memory.

Room is taken before anything is asked for, and never waited for: what does not fit is not asked
for, and computed. Only engines that the file names are dialed, or such as prove to have the token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, NamedTuple

import anyio

from tierloom.pipeline.config.spec import HandoffOptions
from tierloom.pipeline.handoff.arriving_objects import Arrival, Keep, NoRoom
from tierloom.pipeline.handoff.dialed_engines import DialedEngine, DialedEngines
from tierloom.pipeline.handoff.joined_objects import Joining
from tierloom.pipeline.handoff.shares import OwnShare, ShareHolder
from tierloom.pipeline.run.threads import Pool
from tierloom.stages.contract.stage import ChunkOptions
from tierloom.stages.errors import Lost, TierDown
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.object import LINK, Object, object_bytes
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.taking import Take

log = logging.getLogger("tierloom.handoff")

_SHARE = 2
"""Hand-offs take one part in so many of what requests have of the arena."""
_MANY = 64
"""Hand-offs beyond which no ticket is given back before its time."""
_PATIENT = 0.8
"""Of the time to wait, what a prefiller may use: one that lives says in time that nothing comes."""


class _Asked(NamedTuple):
    """What one hand-off asks a worker for."""

    ticket: bytes
    chunks: Sequence[bytes]
    later: bool


class HandoffReceiver:
    """All hand-offs to one pipeline. On its loop."""

    def __init__(
        self, options: HandoffOptions, tiers: Sequence[CircuitBreaker], arena: Arena,
        engines: DialedEngines, own: OwnShare, chunk: ChunkOptions, *, pool: Pool,
    ) -> None:  # fmt: skip
        """`tiers`: that have an index here, one of them memory."""
        self._options, self._tiers, self._arena = options, tiers, arena
        self._memory = next(tier for tier in tiers if tier.in_arena)
        self._own, self._chunk, self._pool = own, chunk, pool
        self._engines = engines
        self._number = self._promised = self._landing = 0
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._arrivals: set[Arrival] = set()
        self._nbytes = 0
        self.landed = self.given_up = 0
        """Objects that came whole, and hand-offs of which not all came."""

    def give_up(self) -> None:
        """What is under way brings nothing more."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        self._closed = True
        self.give_up()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def figures(self) -> dict[str, int]:
        """Objects that have landed, and bytes that have come; hand-offs under way, and such of
        which not all came."""
        nbytes = self._nbytes + sum(arrival.nbytes for arrival in list(self._arrivals))
        return {
            "landed": self.landed, "bytes": nbytes, "landing": self._landing,
            "given_up": self.given_up,
        }  # fmt: skip

    async def land(
        self, host: str, port: int, ticket: bytes, chunks: Sequence[bytes], *, later: bool
    ) -> int:
        """Fetch what of a prompt is not here; how many objects came. Never raises: what does not
        come is computed. `chunks`: grain links of each, from the head on. `later`: the prefiller
        may have yet to hear of the ticket."""
        prefiller = self._engines.engine(host, port)
        if prefiller is None or not self._options.wait:
            return 0
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            sources = await self._sources(prefiller)
            lacking = [links for links in chunks if not self._is_here(links)]
            if not lacking or not sources:
                self._release(sources, ticket)
                return 0
            came = await self._fetch(sources, _Asked(ticket, lacking, later))
            self.landed += came
            self.given_up += came < len(lacking)
            return came
        finally:
            self._tasks.discard(task)

    async def _sources(self, prefiller: DialedEngine) -> list[tuple[ShareHolder, DialedEngine]]:
        """The workers that have what this one wants, of an engine of which one is known; empty:
        there are none, or one of them fails."""
        try:
            ranks = await prefiller.ranks(self._next())
        except (OSError, TimeoutError, TierDown) as error:
            prefiller.failed(error)
            return []
        if ranks is None:
            return [(ShareHolder(self._own.at(""), self._own.geometry, 1), prefiller)]
        found: list[tuple[ShareHolder, DialedEngine]] = []
        for source in self._own.sources(ranks):
            at = prefiller.at(source.rank, ranks)
            who = at and self._engines.engine(*at, source.rank.space, beside=prefiller)
            if not who:
                return []
            found.append((source, who))
        if not found:
            prefiller.ask_anew()
        return found

    async def _fetch(self, sources: list[tuple[ShareHolder, DialedEngine]], wanted: _Asked) -> int:
        """Take room, and fetch what there is room for; how many objects came."""
        joined = sources[0][0].rank.space != self._own.space
        size = self._object_bytes(self._own.geometry)
        if joined:
            size += sum(self._object_bytes(source.geometry) for source, _ in sources)
        arena = self._arena
        room = min(arena.promises.spare, arena.working // _SHARE - self._promised)
        room = min(room, self._memory.stat().capacity)
        count = min(len(wanted.chunks), room // size, wire.KEYS)
        busy = any(who.busy >= self._options.connections for _, who in sources)
        if count <= 0 or busy or not arena.promises.try_reserve(count * size):
            return 0
        self._promised += count * size
        part = wanted._replace(chunks=wanted.chunks[:count])
        try:
            if joined:
                return await self._join(sources, part)
            return len(await self._take(*sources[0], part, self._put))
        except anyio.get_cancelled_exc_class():
            self._release(sources, wanted.ticket)
            raise
        finally:
            self._promised -= count * size
            arena.promises.unreserve(count * size)

    async def _join(self, sources: list[tuple[ShareHolder, DialedEngine]], wanted: _Asked) -> int:
        """Fetch from several workers, or more than is wanted, and put it together."""
        joining = Joining(
            self._own, self._chunk.group, [source for source, _ in sources], self._memory,
            self._arena, self._pool, refuse=self._engines.refuse,
        )  # fmt: skip
        async with AsyncExitStack() as held, anyio.create_task_group() as tasks:
            held.callback(joining.close)
            for i, (source, who) in enumerate(sources):
                take = partial(self._take, source, who, wanted, partial(joining.add, i))
                tasks.start_soon(take, held)
        return joining.came

    async def _put(self, chunk: int, obj: Object) -> Lost | None:
        return (await self._memory.put([obj]))[0]

    def here(self, chunks: Sequence[bytes]) -> int:
        """How many chunks of a prompt are here. `chunks`: grain links of each."""
        return sum(map(self._is_here, chunks))

    def _is_here(self, links: bytes) -> bool:
        """In an object that begins with these grains."""
        found = [f for tier in self._tiers if (f := tier.find(links)) is not None]
        return any(f.grains * LINK == len(links) for f in found)

    def _object_bytes(self, geometry: Geometry) -> int:
        """Of the longest object of a share; frames of another one's may be shorter."""
        chunk, own = self._chunk, geometry == self._own.geometry
        return object_bytes(geometry, chunk.tokens, chunk.grain, chunk.group if own else 1)

    def _next(self) -> int:
        self._number = (self._number + 1) & 0xFFFFFFFF
        return self._number

    def _release(self, sources: Sequence[tuple[ShareHolder, DialedEngine]], ticket: bytes) -> None:
        """Let prefillers know that nothing of a ticket is needed; nobody waits for that."""
        for source, who in sources:
            if len(self._tasks) < _MANY and not self._closed:
                nothing = _Asked(ticket, [], later=False)
                task = asyncio.create_task(self._take(source, who, nothing, self._put))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _take(
        self, source: ShareHolder, who: DialedEngine, wanted: _Asked, keep: Keep,
        until: AsyncExitStack | None = None,
    ) -> list[bytes]:  # fmt: skip
        """Ask a worker for chunks and `keep` what comes; the keys of that. A failure puts the
        worker aside. `until`: what came is held until that ends."""
        who.busy += 1
        self._landing += 1
        arrival = Arrival(
            wanted.chunks, source.rank.space, keep, self._arena,
            largest=self._object_bytes(source.geometry), pool=self._pool,
        )  # fmt: skip
        if until is not None:
            until.callback(arrival.close)
        self._arrivals.add(arrival)
        try:
            async with AsyncExitStack() as stack:
                connection = await who.connect(stack)
                number = self._next()
                keys = [links[-LINK:] for links in wanted.chunks]
                patience = self._options.wait * _PATIENT
                asked = Take(wanted.ticket, patience, wanted.later, keys, source.askers)
                await connection.send(wire.message(wire.Kind.TAKE, number, asked.pack()))
                await arrival.receive(connection, number, self._options.wait)
            who.came()
        except NoRoom as error:
            log.info("a hand-off from %s ends early: %s", who.name, error)
        except (OSError, TimeoutError, TierDown) as error:
            who.failed(error)
        except Exception:
            log.exception("a hand-off from %s failed", who.name)
        finally:
            who.busy -= 1
            self._landing -= 1
            self._arrivals.discard(arrival)
            self._nbytes += arrival.nbytes
            if until is None:
                self._memory.order_for_eviction(arrival.kept)
                arrival.close()
        return arrival.kept
