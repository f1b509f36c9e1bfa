"""What a listener tells its clients, and holds all of them to together."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import anyio

if TYPE_CHECKING:
    from tierloom.stages.directory.shared.hosted import DirectoryHost
    from tierloom.stages.tiers.landing.sender import Sender

_QUEUE = 0.1
"""Seconds for which an object may wait until it is sent, where bytes per second are limited."""
_BURST = 0.1
"""Seconds' worth of bytes that go at once after a rest: a prompt is not spread over time."""


class RateLimit:
    """At most so many bytes per second, to all clients together (a token bucket)."""

    def __init__(self, limit: int) -> None:
        """`limit`: bytes per second; 0: none."""
        self._limit, self._free = limit, 0.0

    @property
    def exceeded(self) -> bool:
        """So much has been sent that what is asked for now would wait too long."""
        return self._free - time.monotonic() > _QUEUE

    async def wait(self, nbytes: int) -> bool:
        """Until `nbytes` may be sent; False: that takes too long, somebody else is to be asked."""
        if not self._limit or self.exceeded:
            return not self._limit
        now = time.monotonic()
        begin = max(now - _BURST, self._free)
        self._free = begin + nbytes / self._limit
        await anyio.sleep(max(0.0, begin - now))
        return True


class Terms(NamedTuple):
    """What every client is told and held to."""

    token: bytes
    epoch: bytes
    window: int
    """Bytes of objects that one PUT may bring."""
    lends: int
    """Bytes that may be lent to one client; all of them together get twice as much."""
    limit: RateLimit = RateLimit(0)
    host: DirectoryHost | None = None
    """Of the directory that is asked here, on the listener's loop."""
    sender: Sender | None = None
    """What writes into memory of clients; None: nothing does."""


class Lending:
    """How much of the memory is lent, in all."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.nbytes = 0
