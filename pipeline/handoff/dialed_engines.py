"""Engines that a pipeline hands prompts to, or gets them from: who may be dialed, and who fails.

Only engines that the file names are dialed, or such as prove to have the token.
"""

from __future__ import annotations

import logging
import time

from tierloom.pipeline.config.spec import HandoffOptions
from tierloom.stages.options import masked
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.server.client import Client, Rejected, read_token

log = logging.getLogger("tierloom.handoff")

DIAL = 1.0
"""Seconds within which an engine lets us in."""
_ASIDE, _LONGEST = 1.0, 30.0
"""Seconds for which an engine that failed is not asked, the first time and at most."""
_MANY = 64
"""Engines that are remembered."""


class DialedEngine:
    """An engine of the other side, which is left alone while it fails."""

    def __init__(self, client: Client, name: str) -> None:
        self.client, self.name = client, name
        self.busy = 0
        """Hand-offs under way."""
        self._strikes, self._retry = 0, 0.0

    @property
    def healthy(self) -> bool:
        return time.monotonic() >= self._retry

    def came(self) -> None:
        self._strikes = 0

    def failed(self, error: Exception) -> None:
        """Leave it alone, twice as long as before."""
        pause = min(_ASIDE * (1 << min(self._strikes, 10)), _LONGEST)
        level = logging.WARNING if isinstance(error, Rejected) else logging.INFO
        log.log(level, "%s is left alone for %.3g s: %s", self.name, pause, masked(repr(error)))
        self._retry = time.monotonic() + pause
        self._strikes += 1


class DialedEngines:
    """All of them. On the pipeline's loop."""

    def __init__(self, options: HandoffOptions, namespace: bytes) -> None:
        """Raises ConfigError."""
        self._options, self._namespace = options, namespace
        self._guarded = bool(read_token(options.token_file))
        self._engines: dict[tuple[str, int], DialedEngine] = {}
        self._refused: set[str] = set()

    def close(self) -> None:
        for engine in self._engines.values():
            engine.client.close()

    def engine(self, host: str, port: int) -> DialedEngine | None:
        """Whoever listens there, if it may be dialed, and does not fail."""
        named = self._options.named
        if named and not named & {(host, port), (host, 0)}:
            self.refuse(f"{host}:{port} is not among handoff.peers")
            return None
        if not named and not self._guarded:
            self.refuse("name handoff.peers, or a token that they prove to have")
            return None
        known = self._engines.get((host, port))
        if known is None:
            address = Address(host, port, tls=self._options.tls)
            client = Client(address, self._namespace, lambda: None, share=False)
            client.prepare(
                self._options.token_file, self._options.ca_file, self._options.connections
            )
            known = self._engines[host, port] = DialedEngine(client, f"{host}:{port}")
            self._forget_some()
        return known if known.healthy else None

    def refuse(self, why: str) -> None:
        """Log, once, why an engine is not asked."""
        if why not in self._refused and len(self._refused) < _MANY:
            self._refused.add(why)
            log.warning("KV is not handed over: %s", why)

    def _forget_some(self) -> None:
        for at, engine in list(self._engines.items())[:-1]:
            if len(self._engines) > _MANY and not engine.busy:
                self._engines.pop(at).client.close()
