"""What is counted only where somebody asks for it: requests, calls of tiers, lives of objects.

Nothing here is imported, and nothing is called for it, before `measure()` of a pipeline or store.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tierloom.pipeline.run.tenants import TenantLedger
from tierloom.stages.contract.request import Request
from tierloom.stages.errors import Lost
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker

SECONDS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5)
NBYTES = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
LIVES = (1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0)
"""Upper bounds of histograms; ages in seconds."""
_SAMPLE = 4096
"""Objects of a tier whose lives are followed, at most."""


class Histogram:
    """Counts by upper bound. Changed by one thread at a time, read by any."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def read(self) -> dict[str, Any]:
        """`counts`: of values up to each of `bounds`, and of those above; none is in two."""
        return {"bounds": list(self._bounds), "counts": list(self._counts), "sum": self._sum}


class CallMeter:
    """Seconds and bytes of one tier's calls that moved objects."""

    def __init__(self) -> None:
        self._seconds = {way: Histogram(SECONDS) for way in ("reads", "puts")}
        self._nbytes = {way: Histogram(NBYTES) for way in ("reads", "puts")}

    def __call__(self, way: str, nbytes: int, seconds: float) -> None:
        self._seconds[way].add(seconds)
        self._nbytes[way].add(nbytes)

    def read(self) -> dict[str, Any]:
        return {
            f"{way}_{what}": found.read()
            for what, ways in (("seconds", self._seconds), ("bytes", self._nbytes))
            for way, found in ways.items()
        }


class SampledLives:
    """Lives of some objects of one tier, chosen by their keys alone: with more objects, fewer.

    How old they are when they are evicted, how long they had not been used then, how long it takes
    until one is used again, and how many came back after they had been evicted (`regretted`): who
    wanted them had to compute them, or to read them from a colder tier. Called under the lock of
    the tier's index.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._mask = clock, 0
        self._lives: dict[bytes, tuple[float, float]] = {}
        """Key to when it came, and when it was used last."""
        self._gone: dict[bytes, None] = {}
        """Evicted, the oldest first."""
        self._age, self._idle, self._gap = Histogram(LIVES), Histogram(LIVES), Histogram(LIVES)
        self._evicted = self._regretted = 0

    def came(self, key: bytes) -> None:
        if not self._follows(key):
            return
        if key in self._gone:
            del self._gone[key]
            self._regretted += 1
        now = self._clock()
        self._lives[key] = (now, now)
        if len(self._lives) > _SAMPLE:  # half of them, from now on
            self._mask = 2 * self._mask + 1
            self._lives = {k: v for k, v in self._lives.items() if self._follows(k)}
            self._gone = {k: None for k in self._gone if self._follows(k)}

    def used(self, keys: Sequence[bytes]) -> None:
        now = self._clock()
        for key in keys:
            if self._follows(key) and (life := self._lives.get(key)) is not None:
                self._gap.add(now - life[1])
                self._lives[key] = (life[0], now)

    def evicted(self, key: bytes) -> None:
        life = self._lives.pop(key, None)
        if life is None:
            return
        now = self._clock()
        self._age.add(now - life[0])
        self._idle.add(now - life[1])
        self._evicted += 1
        self._gone[key] = None
        if len(self._gone) > _SAMPLE:
            del self._gone[next(iter(self._gone))]

    def went(self, key: bytes) -> None:
        """It was deleted."""
        self._lives.pop(key, None)

    def read(self) -> dict[str, Any]:
        return {
            "age": self._age.read(), "idle": self._idle.read(), "gap": self._gap.read(),
            "evicted": self._evicted, "regretted": self._regretted,
        }  # fmt: skip

    def _follows(self, key: bytes) -> bool:
        return not int.from_bytes(key[-4:], "little") & self._mask


class RequestTally:
    """What became of one graph's requests, as their callers were told."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("requests", "asked", "tokens", "bytes"), 0)
        self.seconds, self.nbytes = Histogram(SECONDS), Histogram(NBYTES)

    def read(self) -> dict[str, Any]:
        return self.counts | {"seconds": self.seconds.read(), "sizes": self.nbytes.read()}


class Measures:
    """All of it for one pipeline or store."""

    def __init__(self, tiers: Mapping[str, CircuitBreaker]) -> None:
        """From now on the tiers tell of their calls, and of what they keep."""
        self._tallies = {graph: RequestTally() for graph in ("store", "retrieve")}
        self._lost = dict.fromkeys(Lost, 0)
        self.tenants = TenantLedger()
        self._hit_tokens: dict[str, int] = {}
        self._calls = {name: CallMeter() for name in tiers}
        self._lives = {name: SampledLives() for name, tier in tiers.items() if tier.local}
        for name, tier in tiers.items():
            tier.timed = self._calls[name]
            if tier.local:
                tier.follow(self._lives[name])

    def answer(self, request: Request) -> None:
        """Finish a request, and count what became of it; on the loop."""
        self.tenants.note(request)
        request.finish()
        receipt, tally = request.future.result(), self._tallies[request.graph]
        span, counts = request.span, tally.counts
        counts["requests"] += 1
        counts["asked"] += len(request.tokens) if span is None else span.wanted or span.tokens
        counts["tokens"] += receipt.tokens
        counts["bytes"] += receipt.nbytes
        tally.seconds.add(receipt.seconds)
        tally.nbytes.add(receipt.nbytes)
        for cause, n in receipt.lost.items():
            self._lost[cause] += n
        if request.graph == "retrieve":
            for tier, n in request.tokens_by_tier().items():
                self._hit_tokens[tier] = self._hit_tokens.get(tier, 0) + n

    def read(self) -> dict[str, Any]:
        """Plain numbers, in lists and mappings by name."""
        return {
            "requests": {graph: tally.read() for graph, tally in self._tallies.items()},
            "lost": {cause.name.lower(): n for cause, n in self._lost.items()},
            "hit_tokens": dict(self._hit_tokens),
            "calls": {name: calls.read() for name, calls in self._calls.items()},
            "lives": {name: lives.read() for name, lives in self._lives.items()},
        }
