"""Objects of a tier that exist, but cannot be read here; and those that were not there when read.

The reader lacks their key, calibration or codec, or is older than their writer. Such an object is a
miss, which is counted by cause; each cause is logged once. It stays where it is, counts as stored
for writers, so that nothing is put in its place, and is not planned again for some minutes: its
owner may have deleted it by then.

Of a tier that is asked one by one, a plan guesses what lies between the keys that it asked for.
What did not come is in *doubt*: for a minute it is asked for by itself. What the tier then says it
has, and again does not give, is not planned for a minute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from tierloom.stages.errors import BadObject, Lost
from tierloom.stages.tiers.contract.tier import TierCounts, TierWatch

log = logging.getLogger(__name__)

_MOST = 1 << 14
_FORGET = 600.0
"""Seconds after which an object is tried again."""
_DOUBT = 60.0
"""The same for one that was said to be there, and was not."""
_DOUBTED = 8
"""Most of one prompt that are asked for by themselves."""


class UnreadableObjects:
    """Of one tier. On the loop, except for `in`."""

    def __init__(self, tier: str, counts: TierCounts, clock: Callable[[], float]) -> None:
        """`tier`: its name. Counts are kept in `counts.extra`, by cause."""
        self._tier, self._counts, self._clock = tier, counts, clock
        self._until: dict[bytes, float] = {}
        self._doubts: dict[bytes, float] = {}
        self.watch: TierWatch | None = None
        """Told that each is gone: an index elsewhere must not plan it."""

    def __contains__(self, key: bytes) -> bool:
        """It was unreadable recently: do not request it."""
        until = self._until.get(key)
        return until is not None and self._clock() < until

    def note(self, key: bytes, cause: Lost, why: BadObject | None = None) -> None:
        """An object was found unreadable. `cause`: an `unreadable` one."""
        extra, name = self._counts.extra, cause.name.lower()
        if not extra.get(name):
            log.warning(
                "tier %s has objects that cannot be read here, and keeps them: %s, %s; %s",
                *(self._tier, cause.name, why or f"object {key.hex()[:16]}", cause.cure),
            )
        extra[name] = extra.get(name, 0) + 1
        if self.watch is not None:
            self.watch(False, key)
        self._keep(self._until, key, _FORGET)

    def doubt(self, key: bytes) -> None:
        """An object that was planned was not there."""
        said_twice = self._clock() < self._doubts.get(key, 0.0)
        self._keep(self._until if said_twice else self._doubts, key, _DOUBT)

    def doubted(self, keys: Sequence[bytes]) -> list[int]:
        """Indices of the first few of these that are in doubt."""
        if not self._doubts:
            return []
        now = self._clock()
        found = (i for i, key in enumerate(keys) if now < self._doubts.get(key, 0.0))
        return list(islice(found, _DOUBTED))

    def forget(self, keys: Iterable[bytes]) -> None:
        """These keys were put again or deleted."""
        if self._until or self._doubts:
            for key in keys:
                self._until.pop(key, None)
                self._doubts.pop(key, None)

    def _keep(self, known: dict[bytes, float], key: bytes, seconds: float) -> None:
        known.pop(key, None)
        while len(known) >= _MOST:
            del known[next(iter(known))]
        known[key] = self._clock() + seconds
