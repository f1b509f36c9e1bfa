"""Engines that compute for this one: which of them may be dialed, and which of them fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import anyio

from tierloom.pipeline.config.spec import HandoffOptions
from tierloom.stages.options import masked
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.client import Client, Rejected, read_token, refuse
from tierloom.stages.tiers.server.connection import Connection
from tierloom.stages.tiers.server.ranks import RankShare, unpack_ranks

log = logging.getLogger("tierloom.handoff")

_DIAL = 1.0
"""Seconds within which a prefiller lets us in."""
_ASIDE, _LONGEST = 1.0, 30.0
"""Seconds for which a prefiller that failed is not asked, the first time and at most."""
MANY = 64
"""Prefillers that are remembered."""


class Prefiller:
    """One worker of an engine, and what it keeps of a model: left alone while it fails."""

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
        with anyio.fail_after(_DIAL):
            return await stack.enter_async_context(self.client.connection())

    async def ranks(self, number: int) -> Sequence[RankShare] | None:
        """What each worker of its engine has; None: it does not say. Raises as `connect`."""
        if self._ranks is None:
            async with AsyncExitStack() as stack:
                connection = await self.connect(stack)
                if not self.client.welcome.flags & wire.TELLS_RANKS:  # of an earlier release
                    return None
                with anyio.fail_after(_DIAL):
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


class Prefillers:
    """Those that were dialed. On one loop."""

    def __init__(self, options: HandoffOptions) -> None:
        """Raises ConfigError."""
        self._options = options
        self._guarded = bool(read_token(options.token_file))
        self._known: dict[tuple[str, int, bytes], Prefiller] = {}
        self._refused: set[str] = set()

    @property
    def busy(self) -> int:
        """Hand-offs under way; any thread."""
        return sum(p.busy for p in list(self._known.values()))

    def close(self) -> None:
        for each in self._known.values():
            each.client.close()

    def find(
        self, host: str, port: int, space: bytes, *, beside: Prefiller | None = None
    ) -> Prefiller | None:
        """Whoever listens there, to be asked for KV of a namespace, if it may be dialed, and does
        not fail. `beside`: who told of it, and may be dialed itself."""
        named = self._options.named
        trusted = beside is not None and beside.host == host
        if named and not trusted and not named & {(host, port), (host, 0)}:
            self.refuse(f"{host}:{port} is not among handoff.peers")
            return None
        if not named and not self._guarded:
            self.refuse("name handoff.peers, or a token that they prove to have")
            return None
        known = self._known.get((host, port, space))
        if known is None:
            address = Address(host, port, tls=self._options.tls)
            made: list[Prefiller] = []
            client = Client(address, space, lambda: made[0].ask_anew(), share=False)
            client.prepare(
                self._options.token_file, self._options.ca_file, self._options.connections
            )
            known = self._known[host, port, space] = Prefiller(client, host, port)
            made.append(known)
            self._forget_some()
        return known if known.healthy else None

    def refuse(self, why: str) -> None:
        """Log it, once."""
        if why not in self._refused and len(self._refused) < MANY:
            self._refused.add(why)
            log.warning("KV that is computed elsewhere is not fetched: %s", why)

    def _forget_some(self) -> None:
        for at, prefiller in list(self._known.items())[:-1]:
            if len(self._known) > MANY and not prefiller.busy:
                self._known.pop(at).client.close()


def _address(rank: RankShare) -> Address | None:
    """None: it cannot be dialed from elsewhere."""
    try:
        at = Address.parse(rank.address, "tierloom", tls="tierloom+tls", unix="tierloom+unix")
    except ValueError:
        return None
    return None if at.path else at
