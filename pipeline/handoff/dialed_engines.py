"""Engines that a pipeline hands prompts to, or gets them from: who may be dialed, who fails, and
what the workers of each have.

Only engines that the file names are dialed, or such as prove to have the token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import anyio

from tierloom.pipeline.config.spec import HandoffOptions
from tierloom.stages.errors import ConfigError
from tierloom.stages.options import masked
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.client import Client, Rejected, address_of, read_token, refuse
from tierloom.stages.tiers.server.connection import Connection
from tierloom.stages.tiers.server.ranks import RankShare, unpack_ranks

log = logging.getLogger("tierloom.handoff")

DIAL = 1.0
"""Seconds within which an engine lets us in."""
_ASIDE, _LONGEST = 1.0, 30.0
"""Seconds for which an engine that failed is not asked, the first time and at most."""
_LOOK = 1.0
"""Seconds between two looks for connections whose other side has gone."""
_MANY = 64
"""Engines that are remembered."""


class DialedEngine:
    """A worker of an engine of the other side, which is left alone while it fails."""

    def __init__(self, client: Client, host: str, port: int) -> None:
        self.client, self.host, self.port = client, host, port
        self.name = f"{host}:{port}"
        self.busy = 0
        """Hand-offs under way."""
        self._ranks: list[RankShare] | None = None
        self._strikes, self._retry = 0, 0.0

    @property
    def healthy(self) -> bool:
        return time.monotonic() >= self._retry

    def came(self) -> None:
        self._strikes = 0

    def failed(self, error: Exception) -> None:
        """Leave it alone, twice as long as before."""
        self._ranks = None
        pause = min(_ASIDE * (1 << min(self._strikes, 10)), _LONGEST)
        level = logging.WARNING if isinstance(error, Rejected) else logging.INFO
        log.log(level, "%s is left alone for %.3g s: %s", self.name, pause, masked(repr(error)))
        self._retry = time.monotonic() + pause
        self._strikes += 1

    async def connect(self, stack: AsyncExitStack) -> Connection:
        """A connection for one question. Raises OSError, TimeoutError, TierDown."""
        with anyio.fail_after(DIAL):
            return await stack.enter_async_context(self.client.connection())

    async def ranks(self, number: int) -> Sequence[RankShare] | None:
        """What each worker of its engine has; None: it does not say. Raises as `connect`."""
        if self._ranks is None:
            async with AsyncExitStack() as stack:
                connection = await self.connect(stack)
                if not self.client.welcome.flags & wire.TELLS_RANKS:  # of an earlier release
                    return None
                with anyio.fail_after(DIAL):
                    await connection.send(wire.message(wire.Kind.RANKS, number))
                    message = await connection.message()
                refuse(message, wire.Kind.RANKED)
                self._ranks = unpack_ranks(message.body)
        return self._ranks

    def ask_anew(self) -> None:
        """Its engine has just begun, or is another one: what it said of its workers is old."""
        self._ranks = None

    def at(self, rank: RankShare, ranks: Sequence[RankShare]) -> tuple[str, int] | None:
        """Where a worker of its engine is dialed: by the name that this one is known by, if both
        are on one host. None: nowhere."""
        there = _address(rank)
        if there is None:
            return None
        mine = [a.host for r in ranks if (a := _address(r)) is not None and a.port == self.port]
        return self.host if there.host in mine else there.host, there.port


class DialedEngines:
    """All of them. On the pipeline's loop."""

    def __init__(self, options: HandoffOptions, namespace: bytes) -> None:
        """Raises ConfigError."""
        self._options, self._namespace = options, namespace
        self._guarded = bool(read_token(options.token_file))
        self._engines: dict[tuple[str, int, bytes], DialedEngine] = {}
        self._refused: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for engine in self._engines.values():
            engine.client.close()

    def engine(
        self, host: str, port: int, space: bytes = b"", *, beside: DialedEngine | None = None
    ) -> DialedEngine | None:
        """Whoever listens there, if it may be dialed, and does not fail. `space`: a namespace other
        than one's own in which it is asked. `beside`: who told of it, and may be dialed itself."""
        named, space = self._options.named, space or self._namespace
        trusted = beside is not None and beside.host == host
        if named and not trusted and not named & {(host, port), (host, 0)}:
            self.refuse(f"{host}:{port} is not among handoff.peers")
            return None
        if not named and not self._guarded:
            self.refuse("name handoff.peers, or a token that they prove to have")
            return None
        known = self._engines.get((host, port, space))
        if known is None:
            address = Address(host, port, tls=self._options.tls)
            made: list[DialedEngine] = []
            client = Client(address, space, lambda: made[0].ask_anew(), share=False)
            client.prepare(
                self._options.token_file, self._options.ca_file, self._options.connections
            )
            known = self._engines[host, port, space] = DialedEngine(client, host, port)
            made.append(known)
            self._forget_some()
        self._look_later()
        return known if known.healthy else None

    def refuse(self, why: str) -> None:
        """Log, once, why an engine is not asked."""
        if why not in self._refused and len(self._refused) < _MANY:
            self._refused.add(why)
            log.warning("KV is not handed over: %s", why)

    def _look_later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        """An engine that died leaves no connection open here."""
        self._timer = None
        if sum(engine.client.drop_dead() + engine.busy for engine in self._engines.values()):
            self._look_later()

    def _forget_some(self) -> None:
        for at, engine in list(self._engines.items())[:-1]:
            if len(self._engines) > _MANY and not engine.busy:
                self._engines.pop(at).client.close()


def _address(rank: RankShare) -> Address | None:
    """None: it cannot be dialed from elsewhere."""
    try:
        at = address_of(rank.address)
    except (ConfigError, ValueError):
        return None
    return None if at.path else at
