"""Handoff: a pipeline's part in prefill at one engine and decode at another, for any thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.pipeline.handoff.dialed_engines import DialedEngines
from tierloom.pipeline.handoff.handoff_receiver import HandoffReceiver
from tierloom.pipeline.handoff.promises import Promises
from tierloom.pipeline.handoff.shares import OwnShare
from tierloom.pipeline.run.loop_thread import Portal
from tierloom.pipeline.run.threads import Pool
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.server.client import address_of
from tierloom.stages.tiers.server.ranks import RankShare

if TYPE_CHECKING:
    from tierloom.pipeline.handoff.offers import Offers


def ticket_of(name: str) -> bytes:
    """What a ticket is called between engines, whoever named it, and however long."""
    return sha256(name.encode("utf-8", "surrogatepass")).digest()


class ToldDecoder(NamedTuple):
    """The decoder that a proxy has named to a prefiller, and what that proxy waits for."""

    host: str
    port: int
    request: str
    """Its name at the proxy."""
    notices: int
    """Notes that the proxy wants of its end."""


class Handoff:
    """Made where a file says `serve` or `handoff`. Tickets are what `ticket_of` makes of names."""

    def __init__(
        self, spec: PipelineSpec, tiers: Mapping[str, CircuitBreaker], arena: Arena,
        own: OwnShare, portal: Portal, *, pool: Pool,
    ) -> None:  # fmt: skip
        """Raises ConfigError."""
        self._portal, self._own = portal, own
        self._timer: asyncio.TimerHandle | None = None
        self.promises: Promises | None = None
        """What others are to fetch; None: nothing is served."""
        self.landing: HandoffReceiver | None = None
        """What is fetched from others; None: nothing."""
        self.ranks: list[RankShare] = []
        """Who of this engine's workers serves what: of itself it knows, of others it is told."""
        self.takes_offers = False
        """Others may say what is to be fetched."""
        self.serves_at = Address()
        """Where others ask for what was promised; no host: nowhere."""
        self._engines: DialedEngines | None = None
        self._offers: Offers | None = None
        if spec.serve is not None:
            served = [tiers[name] for name in spec.serve.tiers if tiers[name].in_arena]
            self.promises = Promises(served, spec.serve.ticket)
        if spec.handoff is not None:
            local = [tier for tier in tiers.values() if tier.local]
            self._engines = DialedEngines(spec.handoff, own.space)
            self.landing = HandoffReceiver(
                spec.handoff, local, arena, self._engines, own, spec.chunk, pool=pool
            )
            self.takes_offers = spec.handoff.offers and spec.handoff.wait > 0
            if spec.handoff.proxy and self.promises is not None and spec.serve is not None:
                from tierloom.pipeline.handoff.offers import Offers

                self._offers = Offers(
                    spec.handoff, self._engines, self.promises.release, seconds=spec.serve.ticket
                )

    def listens_at(self, address: str) -> None:
        """Others are told of this pipeline, which serves there."""
        self.serves_at = address_of(address)
        self.ranks[:] = [self._own.at(address)]

    def promise(self, ticket: bytes, chunks: Sequence[bytes]) -> None:
        """Keep chunks for another engine, also such as are yet to be stored. Returns at once.
        `chunks`: grain links of each."""
        self._portal.post(self._promise, ticket, chunks)

    def settle(self, ticket: bytes) -> None:
        """What was promised is stored by now, or was lost. Returns at once."""
        if self.promises is not None:
            self._portal.post(self.promises.settle, ticket)

    def release(self, ticket: bytes) -> None:
        """Nobody will fetch them. Returns at once."""
        if self.promises is not None:
            self._portal.post(self._give_up, ticket)

    def offer(self, ticket: bytes, receiver: ToldDecoder, chunks: Sequence[bytes]) -> None:
        """Have a decoder fetch what is promised, from now on. Returns at once. `chunks`: grain
        links of each."""
        if self._offers is not None:
            self._portal.post(self._offers.begin, ticket, receiver, chunks, self.serves_at)

    def end_offer(self, ticket: bytes, receiver: ToldDecoder) -> None:
        """A request has been answered whose proxy has named a decoder: tell the proxy, as soon as
        that has what it can get. Returns at once. `ticket`: empty where nothing was promised."""
        if self._offers is not None:
            self._portal.post(self._offers.end, ticket, receiver)

    def take_offer(
        self, host: str, port: int, ticket: bytes, chunks: Sequence[bytes]
    ) -> Future[int]:
        """Fetch what another engine offers; how many of its chunks are here then. From any thread;
        a caller who cancels it ends it."""
        return self._portal.begin(self._take_offer, host, port, ticket, chunks)

    def land(
        self, host: str, port: int, ticket: bytes, chunks: Sequence[bytes], *, later: bool
    ) -> Future[int]:
        """`HandoffReceiver.land`, from any thread; a caller who cancels it ends it."""
        if self.landing is None:
            nothing: Future[int] = Future()
            nothing.set_result(0)
            return nothing
        return self._portal.begin(self._land, host, port, ticket, chunks, later)

    def clear(self) -> None:
        """What was promised is kept no more, and what is under way brings nothing: all that there
        is of it is to be forgotten. On the loop."""
        if self.promises is not None:
            self.promises.clear()
        if self.landing is not None:
            self.landing.give_up()
        if self._offers is not None:
            self._offers.clear()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.clear()
        if self._offers is not None:
            await self._offers.close()
        if self.landing is not None:
            await self.landing.close()
        if self._engines is not None:
            self._engines.close()

    def figures(self) -> dict[str, int]:
        """Tickets that are open, the bytes they hold, and what has landed."""
        promises, landing = self.promises, self.landing
        held: dict[str, int] = {}
        if promises is not None:
            held = {"tickets": len(promises), "pinned": promises.pinned}
        if self._offers is not None:
            held |= {"offers": len(self._offers), "taken": self._offers.taken}
        return held | (landing.figures() if landing is not None else {})

    async def _land(
        self, host: str, port: int, ticket: bytes, chunks: Sequence[bytes], later: bool
    ) -> int:
        assert self.landing is not None
        return await self.landing.land(host, port, ticket, chunks, later=later)

    async def _take_offer(
        self, host: str, port: int, ticket: bytes, chunks: Sequence[bytes]
    ) -> int:
        assert self.landing is not None
        await self.landing.land(host, port, ticket, chunks, later=True)
        return self.landing.here(chunks)

    def _give_up(self, ticket: bytes) -> None:
        assert self.promises is not None
        if self._offers is not None:
            self._offers.forget(ticket)
        self.promises.release(ticket)

    def _promise(self, ticket: bytes, chunks: Sequence[bytes]) -> None:
        if self.promises is not None:
            self.promises.open(ticket, chunks)
            self._sweep()

    def _sweep(self) -> None:
        """End what is over, and look again when the next ticket is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        assert self.promises is not None
        left = self.promises.expire()
        if left is not None:
            self._timer = asyncio.get_running_loop().call_later(left + 0.01, self._sweep)
