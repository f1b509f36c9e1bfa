"""One direction of a tier, its reads or its puts: when it is left alone, and what is said of it.

A full or read-only place goes on serving what it has, and one that takes everything may give
nothing back: how one direction fares says nothing of the other.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from traceback import format_exception
from typing import Protocol

from tierloom.stages.errors import Lost, Refused, TierDown, TierloomError
from tierloom.stages.options import masked

log = logging.getLogger(__name__)

AGAIN = 300.0
"""Seconds after which a log line about a tier that is still down is repeated."""
REFUSES = 60.0
"""Seconds for which nothing is put where a put was refused."""
_ROOM = (errno.ENOSPC, errno.EDQUOT)
_RIGHTS = (errno.EROFS, errno.EACCES, errno.EPERM)


class Limits(Protocol):
    """When a tier counts as down."""

    @property
    def timeout(self) -> float:
        """Seconds one call may take."""

    @property
    def fails(self) -> int:
        """Failures in a row that open the breaker."""

    @property
    def probe(self) -> float:
        """Seconds before an open breaker lets one call through."""


class Direction:
    """Closed while it works. `fails` failures in a row open it: from then on nothing waits for it,
    except one call every `probe` seconds, the first of which that succeeds closes it. A call that
    moves no object cannot make good one that should have."""

    def __init__(self, what: str, tier: str, limits: Limits, clock: Callable[[], float]) -> None:
        """`what`: reads or puts; `tier`: its name and address, for the log; `clock`: monotonic."""
        self._what, self._tier, self._limits, self._clock = what, tier, limits, clock
        self.failures = 0
        self.probing = False
        self.down_since = 0.0
        """Seconds since the epoch; 0: it works."""
        self.last_error = ""
        self.refusal: Lost | None = None
        """Why nothing is put now, though the place works."""
        self._cargo_failed = self._logged_unexpected = False
        self._retry = self._began = self._said = 0.0
        self._back = ""

    @property
    def closed(self) -> bool:
        return self.failures < self._limits.fails and self.refusal is None

    @property
    def open_to_calls(self) -> bool:
        """A call would be let through: it is closed, or a probe is due."""
        return self.closed or (not self.probing and self._clock() >= self._retry)

    def succeeded(self, *, cargo: bool) -> None:
        """A call did. `cargo`: it moved objects."""
        if not cargo and (self._cargo_failed or self.refusal is not None):
            return
        if self.down_since and self._back:
            after = self._clock() - self._began
            log.warning("tier %s %s after %.0f s", self._tier, self._back, after)
        self.failures, self._cargo_failed, self.refusal = 0, False, None
        self.down_since = 0.0

    def failed(self, error: BaseException, *, cargo: bool, quiet: bool = False) -> None:
        """A call did. `quiet`: of what follows nothing is said."""
        self.failures += 1
        self._cargo_failed = self._cargo_failed or cargo
        if not isinstance(error, (OSError, TierDown)) and not self._logged_unexpected:
            self._logged_unexpected = True
            trace = masked("".join(format_exception(error)))
            log.error("tier %s raised an unexpected error\n%s", self._tier, trace)
        if self.failures >= self._limits.fails:
            said = (f"{self._what} fail", f"{self._what} work again")
            self.trip(error, *(() if quiet else said))

    def trip(self, error: BaseException, down: str = "", back: str = "") -> None:
        """Open it. `down`, `back`: what is said of it, then and at its end; empty: nothing, as
        somebody else does."""
        self.failures = max(self.failures, self._limits.fails)
        self._retry = self._clock() + self._limits.probe
        self._down(down, back, error)

    def refused(self, why: Lost, error: BaseException) -> None:
        """The place takes nothing, and works: it is asked again in a minute."""
        self.refusal, self._retry = why, self._clock() + REFUSES
        self._down("takes nothing, and serves what it has", "takes puts again", error)

    def retry(self) -> None:
        """Something has changed: the next put is tried."""
        if self.refusal is not None:
            self._retry = 0.0

    def _down(self, down: str, back: str, error: BaseException) -> None:
        now, self.last_error = self._clock(), cause(error)
        if not self.down_since:
            self.down_since, self._began, self._said, self._back = time.time(), now, -AGAIN, ""
        if down and now - self._said >= AGAIN:
            self._said, self._back = now, back
            log.warning("tier %s %s: %s", self._tier, down, self.last_error)


def why_refused(error: BaseException) -> Lost | None:
    """Why a place refused a put, if it did; None: it failed."""
    if isinstance(error, Refused):
        return error.lost
    number = error.errno if isinstance(error, OSError) else None
    return Lost.NO_ROOM if number in _ROOM else Lost.REFUSED if number in _RIGHTS else None


def cause(error: BaseException) -> str:
    """For the log: a client's error may contain its URL with the password."""
    plain = isinstance(error, (OSError, TierloomError)) and str(error)
    return masked(str(error) if plain else repr(error))
