"""HandoffReceiver: KV that another engine computed for this one, fetched into this one's memory.

Room is taken before anything is asked for, and never waited for: what does not fit is not asked
for, and computed. Only engines that the file names are dialed, or such as prove to have the token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import anyio

from tierloom.pipeline.config.spec import HandoffOptions
from tierloom.pipeline.handoff.arriving_objects import Arrival, NoRoom
from tierloom.pipeline.handoff.dialed_engines import DIAL, DialedEngine, DialedEngines
from tierloom.pipeline.run.threads import Pool
from tierloom.stages.errors import TierDown
from tierloom.stages.kv.object import LINK
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
"""Of that time, what the prefiller may use: one that lives says in time that nothing comes."""


class HandoffReceiver:
    """All hand-offs to one pipeline. On its loop."""

    def __init__(
        self, options: HandoffOptions, tiers: Sequence[CircuitBreaker], arena: Arena,
        engines: DialedEngines, *, namespace: bytes, object_bytes: int, pool: Pool,
    ) -> None:  # fmt: skip
        """`tiers`: that have an index here, one of them memory. `object_bytes`: of the longest
        object."""
        self._options, self._tiers, self._arena = options, tiers, arena
        self._memory = next(tier for tier in tiers if tier.in_arena)
        self._namespace, self._object_bytes, self._pool = namespace, object_bytes, pool
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
        lacking = [links for links in chunks if not self._is_here(links)]
        if not lacking:
            self._release(prefiller, ticket)
            return 0
        size, arena = self._object_bytes, self._arena
        room = min(arena.promises.spare, arena.working // _SHARE - self._promised)
        room = min(room, self._memory.stat().capacity)
        count = min(len(lacking), room // size, wire.KEYS)
        busy = prefiller.busy >= self._options.connections
        if count <= 0 or busy or not arena.promises.try_reserve(count * size):
            self.given_up += 1
            return 0
        self._promised += count * size
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            came = await self._take(prefiller, ticket, lacking[:count], later=later)
        except anyio.get_cancelled_exc_class():
            self._release(prefiller, ticket)
            raise
        finally:
            self._tasks.discard(task)
            self._promised -= count * size
            arena.promises.unreserve(count * size)
        self.given_up += came < len(lacking)
        return came

    def here(self, chunks: Sequence[bytes]) -> int:
        """How many chunks of a prompt are here. `chunks`: grain links of each."""
        return sum(map(self._is_here, chunks))

    def _is_here(self, links: bytes) -> bool:
        """In an object that begins with these grains."""
        found = [f for tier in self._tiers if (f := tier.find(links)) is not None]
        return any(f.grains * LINK == len(links) for f in found)

    def _release(self, prefiller: DialedEngine, ticket: bytes) -> None:
        """Let a prefiller know that nothing of a ticket is needed; nobody waits for that."""
        if len(self._tasks) < _MANY and not self._closed:
            task = asyncio.create_task(self._take(prefiller, ticket, [], later=False))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take(
        self, prefiller: DialedEngine, ticket: bytes, chunks: Sequence[bytes], *, later: bool
    ) -> int:
        """Ask for chunks and keep what comes; how many. A failure puts the prefiller aside."""
        prefiller.busy += 1
        self._landing += 1
        arrival = Arrival(
            chunks, self._namespace, self._memory, self._arena, largest=self._object_bytes,
            pool=self._pool,
        )  # fmt: skip
        self._arrivals.add(arrival)
        try:
            async with AsyncExitStack() as stack:
                with anyio.fail_after(DIAL):
                    connection = await stack.enter_async_context(prefiller.client.connection())
                self._number = (self._number + 1) & 0xFFFFFFFF
                keys = [links[-LINK:] for links in chunks]
                asked = Take(ticket, self._options.wait * _PATIENT, later, keys)
                question = wire.message(wire.Kind.TAKE, self._number, asked.pack())
                await connection.send(question)
                await arrival.receive(connection, self._number, self._options.wait)
            prefiller.came()
        except NoRoom as error:
            log.info("a hand-off from %s ends early: %s", prefiller.name, error)
        except (OSError, TimeoutError, TierDown) as error:
            prefiller.failed(error)
        except Exception:
            log.exception("a hand-off from %s failed", prefiller.name)
        finally:
            prefiller.busy -= 1
            self._landing -= 1
            self.landed += arrival.came
            self._arrivals.discard(arrival)
            self._nbytes += arrival.nbytes
            arrival.close()
        return arrival.came
