"""Pins that end: who wants which objects kept, and until when."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker

_SHARE = 0.5
"""Of a tier's bytes that may be pinned: the rest goes on to serve everybody."""


class Pinned(NamedTuple):
    """What became of one call."""

    objects: int
    absent: int
    """They are in no tier whose index is here."""
    no_room: int
    """Half of their tiers is pinned already."""
    held: str
    """Of each key in the order given: 1 where it is pinned, else 0."""

    def plus(self, other: Pinned) -> Pinned:
        """The same of keys that follow."""
        return Pinned(
            self.objects + other.objects, self.absent + other.absent,
            self.no_room + other.no_room, self.held + other.held,
        )  # fmt: skip


class PinLeases:
    """On the loop of the tiers. An object is protected while any owner wants it, in each tier that
    has it when it is pinned; a tier's own `ttl` ends it all the same."""

    def __init__(
        self, tiers: Mapping[str, CircuitBreaker], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock`: monotonic, in seconds."""
        self._tiers, self._clock = tiers, clock
        self._until: dict[bytes, dict[str, float]] = {}
        self._bytes: dict[bytes, dict[str, int]] = {}
        """Of each that is pinned, by tier; and their sums."""
        self._sums = Counter[str]()
        self._timer: asyncio.TimerHandle | None = None

    def pin(self, owner: str, keys: Sequence[bytes], seconds: float) -> Pinned:
        """Objects that are pinned by somebody already count as pinned. Call `wake` afterwards."""
        until, absent, no_room, held = self._clock() + seconds, 0, 0, ""
        for key in dict.fromkeys(keys):
            found = {n: f for n, t in self._tiers.items() if t.local and (f := t.find(key))}
            there = {n: f.nbytes for n, f in found.items() if f.key == key}
            mine = self._bytes.get(key, {})
            fits = {n: b for n, b in there.items() if n in mine or self._fits(n, b)}
            held += "1" if fits else "0"
            if not fits:
                absent, no_room = absent + (not there), no_room + bool(there)
                continue
            for name, nbytes in fits.items():
                self._sums[name] += 0 if name in mine else nbytes
                self._tiers[name].lease([key])
            self._bytes[key] = mine | fits
            owners = self._until.setdefault(key, {})
            owners[owner] = max(until, owners.get(owner, 0.0))
        return Pinned(held.count("1"), absent, no_room, held)

    def unpin(self, owner: str, keys: Iterable[bytes] | None = None) -> int:
        """How many objects this owner had pinned; None: all of them."""
        chosen = list(self._until if keys is None else dict.fromkeys(keys))
        return sum(self._end(key, owner) for key in chosen)

    def owners(self) -> dict[str, dict[str, float]]:
        """Objects of each owner, and seconds until the last of its pins ends."""
        self.end_what_is_over()
        now, found = self._clock(), dict[str, dict[str, float]]()
        for owners in self._until.values():
            for owner, until in owners.items():
                row = found.setdefault(owner, {"objects": 0, "seconds": 0.0})
                row["objects"] += 1
                row["seconds"] = max(row["seconds"], until - now)
        return found

    def end_what_is_over(self) -> None:
        """By the clock; otherwise it happens by itself."""
        now = self._clock()
        over = [(k, o) for k, owners in self._until.items() for o, t in owners.items() if t <= now]
        for key, owner in over:
            self._end(key, owner)

    def _end(self, key: bytes, owner: str) -> bool:
        owners = self._until.get(key, {})
        if owners.pop(owner, None) is None:
            return False
        if not owners:
            del self._until[key]
            self._sums.subtract(self._bytes.pop(key))
            for tier in self._tiers.values():
                if tier.local:
                    tier.lease([key], leased=False)
        return True

    def _fits(self, tier: str, nbytes: int) -> bool:
        return self._sums[tier] + nbytes <= _SHARE * self._tiers[tier].stat().capacity

    def wake(self) -> None:
        """See to it that each ends in time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._until:
            first = min(min(owners.values()) for owners in self._until.values())
            wait = max(0.0, first - self._clock())
            self._timer = asyncio.get_running_loop().call_later(wait, self._over)

    def _over(self) -> None:
        self._timer = None
        self.end_what_is_over()
        self.wake()
