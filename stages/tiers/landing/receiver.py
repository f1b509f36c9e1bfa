"""Receiver: memory of our own that other engines write objects into, and what becomes of it.

Objects are copied on into the arena, and checked on the way, as soon as a frame's last byte has
landed. So nothing that others can write to is ever handed on; what the landing space is taken from
nobody reads; and objects can be promoted, and read by a device.

A place whose writes are not known to be over is in doubt, and is not used again until the writer
has said how many writes there were and each of them was heard of. Where that does not come, the
*fence*: the agent is destroyed, the region is left without access, and another takes its place.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping

from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.kv.object import Header
from tierloom.stages.memory.allocator import aligned
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.landing.arrival import CopyHashed, Landing
from tierloom.stages.tiers.landing.landing_protocol import AgentCard, note_of, pieces
from tierloom.stages.tiers.landing.polled import PolledThread
from tierloom.stages.tiers.landing.region import LandingRegion
from tierloom.stages.tiers.nixl.agent import Agent
from tierloom.stages.tiers.server.protocol import Item

log = logging.getLogger(__name__)

_DOUBT = 2.0
"""Seconds for which a place may be in doubt; and at most a quarter of all places may."""
_MET = 500
"""Writers after which the agent is made anew: each leaves a file descriptor open."""


class Receiver(PolledThread):
    """Starts when first asked for; not ready until then, and for a moment after each fence."""

    def __init__(
        self, nbytes: int, namespace: bytes, backend: str, params: Mapping[str, str]
    ) -> None:
        """`nbytes`: of the landing space. `params`: of NIXL's plugin."""
        super().__init__("tierloom-landing")
        self._nbytes, self._namespace = nbytes, namespace
        self._backend, self._params = backend, params
        self._process, self._agents = secrets.token_hex(8), 0
        self._agent: Agent | None = None
        self._region: LandingRegion | None = None
        self._live: dict[int, Landing] = {}
        self._lock = threading.Lock()
        self._met = 0
        self._asked = False
        self._copy_hashed: CopyHashed
        self.card: AgentCard | None = None
        """What writers are told; None: not ready."""
        self.broken = ""
        """Why it never will be."""
        self.fences = self.landed = 0

    @property
    def ready(self) -> bool:
        """Places can be had. If not, it is being made ready."""
        if self.card is None and not self._asked:
            self._asked = self.post(self._open)
        return self.card is not None

    @property
    def in_doubt(self) -> int:
        """Bytes of places that may still be written into although nobody waits for it."""
        return sum(each.room for each in list(self._live.values()) if each.abandoned)

    def lease(self, room: int) -> Landing | None:
        """A place for `room` bytes; None: there is none now. Any thread."""
        with self._lock:
            region = self._region if self.card is not None else None
            offset = region.space.take(room) if region is not None else None
            if region is None or offset is None:
                return None
            landing = Landing(region, offset, aligned(room))
            self._live[landing.ticket] = landing
            return landing

    def met(self) -> None:
        """A writer was told the card."""
        self._met += 1

    def free(self, landing: Landing) -> None:
        """Nobody was told of it, or it was refused: nothing is written there."""
        self.post(self._settle, landing)

    def expect(
        self, landing: Landing, item: Item, key: bytes, header: Header | None, lease: Lease | None
    ) -> asyncio.Future[Header]:
        """Bytes are on their way there; they go on to `lease`, an object's own lease. The header,
        once all have come and are right; raises BadObject, TierDown. `header`: of an object whose
        first frames have come before."""
        landing.key, landing.header, landing.nbytes = key, header, item.nbytes
        landing.begin, landing.end, landing.loaded = item.begin, item.end, item.loaded
        landing.lease = lease.retain() if lease is not None else None
        landing.result = future = landing.loop.create_future()  # last: the thread looks for it
        if not self.post(self._expected, landing):
            landing.failure = TierDown("the landing space is closed")
            landing.answer(landing.failure)
        return future

    def written(self, landing: Landing, posted: int) -> None:
        """The writer says that it is through, after so many writes."""
        self.post(self._written, landing, posted)

    def give_up(self, landing: Landing) -> None:
        """Nobody waits for it any more: nothing more is copied, and it is in doubt."""
        self.post(self._doubt, landing)

    def lost(self, landing: Landing) -> None:
        """Who writes there is dead or gone, and cannot say any more what is on its way."""
        self.post(self._lost, landing)

    # On the thread.

    @property
    def _busy(self) -> bool:
        return bool(self._live)

    def _open(self) -> None:
        self._agents += 1
        name = f"tierloom-landing-{os.getpid()}-{self._process}-{self._agents}"
        region = None
        try:
            region = LandingRegion(self._nbytes)
            agent = Agent(self._backend, self._params, region, shared=False, name=name, polled=True)
            metadata = agent.metadata
            from tierloom.triton_kernels.checksum.copy_cpu import copy_hashed

            copy_hashed(region.address, region.address, 0)  # compiled before anybody waits for it
            self._copy_hashed = copy_hashed
        except (ConfigError, TierDown, OSError) as error:
            self.broken = str(error)
            log.warning("objects of other engines come without NIXL: %s", error)
            if region is not None:
                region.close()
            return
        with self._lock:
            self._agent, self._region, self._met = agent, region, 0
            self.card = AgentCard(name, region.address, region.total, metadata)

    def _look(self) -> bool:
        if self._agent is None:
            return False
        try:
            heard = self._agent.notes()
        except TierDown as error:
            self._fence(str(error))
            return False
        for note in heard:
            known = note_of(note)
            landing = self._live.get(known[0]) if known is not None else None
            if known is not None and landing is not None:
                landing.arrived.add(known[1])
                self._look_at(landing)
        now = time.monotonic()
        if any(each.doubt and now - each.doubt > _DOUBT for each in list(self._live.values())):
            self._fence("a writer does not say whether it is through")
        elif self.in_doubt > self._nbytes // 4:
            self._fence("a quarter of the landing space is in doubt")
        return bool(heard)

    def _expected(self, landing: Landing) -> None:
        if landing.failure is not None:  # the place was taken away before
            landing.answer(landing.failure)
        self._look_at(landing)

    def _look_at(self, landing: Landing) -> None:
        """Copy what has come; whether it is over."""
        if self._agent is not None:
            landing.go_on(self._namespace, self._copy_hashed)
        if landing.over:
            if landing.posted < pieces(landing.end - landing.begin):
                landing.fail(TierDown("its writer gave up"))
            self._settle(landing)

    def _written(self, landing: Landing, posted: int) -> None:
        landing.posted = posted
        landing.doubt = landing.doubt or time.monotonic()
        self._look_at(landing)

    def _doubt(self, landing: Landing) -> None:
        landing.fail(TierDown("nobody waits for it"))
        if landing.ticket in self._live:
            landing.abandoned = True
            landing.doubt = landing.doubt or time.monotonic()

    def _lost(self, landing: Landing) -> None:
        landing.fail(TierDown("its writer is gone"))
        if landing.ticket in self._live and not landing.over:
            self._fence("a writer is gone")

    def _settle(self, landing: Landing) -> None:
        """Nothing is written there any more: others may have the place."""
        landing.fail(TierDown("it was not written"))
        with self._lock:
            if self._live.pop(landing.ticket, None) is not None and landing.region is self._region:
                landing.region.space.give(landing.offset, landing.room)
        if self._met > _MET and (parts := self._take_apart(idle=True)) is not None:
            agent, region, _ = parts
            agent.destroy()
            region.close()
            self._open()

    def _fence(self, why: str) -> None:
        """No byte lands any more, whoever is still writing."""
        if (parts := self._take_apart()) is None:
            return
        self.fences += 1
        log.info("the landing space is made anew: %s", why)
        agent, region, live = parts
        agent.destroy()
        region.retire()
        for landing in live:
            landing.fail(TierDown("the landing space was taken away"))
            landing.tell_fenced()
        if not self._closed:
            self._open()

    def _take_apart(
        self, *, idle: bool = False
    ) -> tuple[Agent, LandingRegion, list[Landing]] | None:
        """What there is now, of which no more places are had. `idle`: only where none is."""
        with self._lock:
            agent, region = self._agent, self._region
            if agent is None or region is None or (idle and self._live):
                return None
            live, self._live = list(self._live.values()), {}
            self._agent = self._region = self.card = None
        return agent, region, live

    def _end(self) -> None:
        if self._live:
            self._fence("it is closed")
        elif (parts := self._take_apart()) is not None:
            parts[0].destroy()
            parts[1].close()
