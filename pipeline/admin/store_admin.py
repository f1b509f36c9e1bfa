"""StoreAdmin: orders to the tiers of one pipeline or store, each with one line in the log."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from anyio.lowlevel import checkpoint

from tierloom.pipeline.admin.admin_bodies import (
    BypassBody,
    ClearBody,
    DrainBody,
    FreezeBody,
    LogLevelBody,
    PinBody,
    PrefetchBody,
    ProgressBody,
    UnpinBody,
    body_of,
)
from tierloom.pipeline.admin.pin_leases import PinLeases, Pinned
from tierloom.pipeline.admin.promotion import promote_keys
from tierloom.pipeline.admin.whose import Whose
from tierloom.stages.errors import InputError, Lost
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.index import Entry

log = logging.getLogger("tierloom.admin")
log.setLevel(logging.INFO)  # its own, whatever an order makes of the others

_TURN = 64
"""Objects looked at or deleted between two turns of the loop."""
_ASKS = ("usage", "pins", "progress")
Answer = dict[str, Any]


class StoreAdmin:
    """`begin` from any thread; all else on the loop of the tiers."""

    def __init__(
        self, tiers: Mapping[str, CircuitBreaker], whose: Whose,
        begin: Callable[[Coroutine[Any, Any, Answer]], Future[Answer]], *,
        halt: Callable[[], Awaitable[None]], under_way: Callable[[], dict[str, int]],
        object_bytes: int = 0,
    ) -> None:  # fmt: skip
        """`begin`: starts a coroutine on the loop. `halt`: ends stores under way. `under_way`: what
        is not done yet, by kind. `object_bytes`: of a chunk in memory; 0: nothing is prefetched."""
        self._tiers, self._whose, self._begin = tiers, whose, begin
        self._halt, self._under_way = halt, under_way
        self._object_bytes = object_bytes
        self.leases = PinLeases(tiers)
        self._progress: dict[str, tuple[int, int]] = {}
        """Of orders under way: chunks done, and chunks in all."""
        self._frozen = set[str]()
        self.drains = False
        """It was ordered to take nothing new."""

    def begin(self, order: str, said: Mapping[str, Any], id: str = "") -> Future[Answer]:
        """What came of it, as plain values. `id`: by which `progress` knows it. Raises InputError;
        so does the result, where it needs the tiers to be known to be wrong."""
        body = body_of(order, said)
        keys, tokens = list[bytes](), 0
        if isinstance(body, PinBody | UnpinBody):
            keys, tokens = self._whose.keys(body)
        elif isinstance(body, PrefetchBody):
            keys, tokens = self._whose.all_keys(body), len(body.tokens)
        return self._begin(self._run(order, body, keys, tokens, id))

    async def _run(self, order: str, body: Any, keys: list[bytes], tokens: int, id: str) -> Answer:
        answer: Answer
        match body:
            case ClearBody():
                answer = await self._clear(body)
            case PinBody():
                answer = await self._pin(body, keys) | {"tokens": tokens, "seconds": body.seconds}
            case PrefetchBody():
                answer = await self._prefetch(keys, id) | {"tokens": tokens}
            case ProgressBody():
                done, asked = self._progress.get(body.id, (0, 0))
                answer = {"done": done, "asked": asked}
            case UnpinBody():
                chosen = keys if body.tokens or body.chunks else None
                answer = {"objects": self.leases.unpin(body.owner, chosen)}
            case FreezeBody():
                names = self._named(body.tiers)
                self._frozen = self._frozen | names if body.on else self._frozen - names
                answer = self._apply()
            case BypassBody():
                for name in self._named(body.tiers):
                    self._tiers[name].bypassed = body.on
                answer = self._apply()
            case DrainBody():
                self.drains = body.on
                answer = self._apply() | {"under_way": self._under_way()}
            case LogLevelBody():
                logging.getLogger(body.logger).setLevel(body.level.upper())
                answer = {"logger": body.logger, "level": body.level}
            case _:
                pins = {"owners": self.leases.owners()}
                answer = pins if order == "pins" else pins | await self._usage()
        if order not in _ASKS:  # a warning, so that it is there whatever is logged
            log.warning("admin: %s %s: %s", order, _told(body), answer)
        return answer

    async def _pin(self, body: PinBody, keys: list[bytes]) -> Answer:
        total, keys = Pinned(0, 0, 0, ""), list(dict.fromkeys(keys))
        for at in range(0, len(keys), _TURN):
            some = self.leases.pin(body.owner, keys[at : at + _TURN], body.seconds)
            total = total.plus(some)
            await checkpoint()
        self.leases.wake()
        return total._asdict()

    async def _prefetch(self, keys: list[bytes], id: str) -> Answer:
        def told(done: int) -> None:
            self._progress[id] = done, len(keys)

        told(0)
        try:
            return await promote_keys(keys, self._tiers, self._object_bytes, told)
        finally:
            del self._progress[id]

    def _apply(self) -> Answer:
        for name, tier in self._tiers.items():
            tier.frozen = self.drains or name in self._frozen
        return {
            "frozen": [n for n, tier in self._tiers.items() if tier.frozen],
            "bypassed": [n for n, tier in self._tiers.items() if tier.bypassed],
            "draining": self.drains,
        }

    def _named(self, tiers: list[str]) -> set[str]:
        """Raises InputError."""
        if unknown := [name for name in tiers if name not in self._tiers]:
            raise InputError(f"tier {unknown[0]!r:.80}: known: {', '.join(self._tiers)}")
        return set(tiers or self._tiers)

    async def _clear(self, body: ClearBody) -> Answer:
        chosen, fits = self._named(body.tiers), self._whose.fits(body)
        if body.everything and not body.dry_run:
            await self._halt()
        done: dict[str, dict[str, int]] = {}
        skipped, pinned = dict[str, str](), 0
        for name, tier in self._tiers.items():
            if name not in chosen:
                continue
            if not tier.local:
                await self._clear_remote(body, name, tier, done, skipped)
                continue
            found: list[Entry[Any]] = []
            for i, entry in enumerate(tier.entries(), 1):
                if fits(entry) and tier.age(entry) >= body.age:
                    kept = (entry.pinned or entry.leased) and not body.pinned
                    pinned += kept
                    found += [] if kept else [entry]
                if i % _TURN == 0:
                    await checkpoint()
            objects = len(found)
            if not body.dry_run:
                objects = 0
                for at in range(0, len(found), _TURN):
                    objects += await tier.delete([e.key for e in found[at : at + _TURN]])
                if left := sum(await tier.exists([e.key for e in found])):
                    skipped[name] = f"{left} objects are still there, or there again"
            done[name] = {"objects": objects, "bytes": sum(e.nbytes for e in found)}
        return {
            "dry_run": body.dry_run, "objects": sum(d["objects"] for d in done.values()),
            "tiers": done, "pinned": pinned, "skipped": skipped,
        }  # fmt: skip

    async def _clear_remote(
        self, body: ClearBody, name: str, tier: CircuitBreaker, done: dict[str, dict[str, int]],
        skipped: dict[str, str],
    ) -> None:  # fmt: skip
        if not body.remote:
            skipped[name] = "what it has is not known in this process"
        elif body.dry_run:
            skipped[name] = "it would be emptied of this model; how much that is, it does not say"
        else:
            cleared = await tier.clear()
            if isinstance(cleared, Lost):
                skipped[name] = f"it did not do it: {cleared.name.lower()}"
            else:
                done[name] = {"objects": cleared, "bytes": 0}

    async def _usage(self) -> Answer:
        """Objects and bytes, of tiers whose index is in this process."""
        tiers: dict[str, Counter[str]] = {}
        spaces: dict[str, Counter[str]] = defaultdict(Counter)
        tenants: dict[str, Counter[str]] = defaultdict(Counter)
        for name, tier in self._tiers.items():
            tiers[name] = Counter(objects=0, bytes=0, pinned=0)
            if not tier.local:
                tiers[name].update(objects=tier.stat().objects, bytes=tier.stat().nbytes)
            for i, entry in enumerate(tier.entries(), 1):
                held = {"objects": 1, "bytes": entry.nbytes}
                tiers[name].update(held, pinned=entry.pinned or entry.leased)
                spaces[self._whose.space(entry).hex()].update(held)
                tenants[self._whose.tenant(entry)].update(held)
                if i % _TURN == 0:
                    await checkpoint()
        models = self._whose.models()
        return self._apply() | {
            "tiers": {name: dict(held) for name, held in tiers.items()},
            "namespaces": {
                s: {"model": models.get(s, ""), **held} for s, held in spaces.items()
            },
            "tenants": {tenant: dict(held) for tenant, held in tenants.items()},
        }  # fmt: skip


def _told(body: Any) -> dict[str, Any]:
    """A body for the log: no tenant's secret, and of what is long how long it is."""
    told = {name: value for name, value in asdict(body).items() if value not in ("", None, [], {})}
    told |= {name: f"({len(told[name])})" for name in ("tokens", "chunks") if name in told}
    return told | {name: "***" for name in ("salt", "tags") if name in told}
