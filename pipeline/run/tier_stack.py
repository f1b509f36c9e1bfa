"""A file's tiers, opened: each under its circuit breaker, best first."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Protocol

from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.pipeline.run.threads import Pool
from tierloom.stages.kv.object import Object
from tierloom.stages.kv.text import Text
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import TierContext


class Note(Protocol):
    """A `TierWatch` of all tiers, which are told apart by name."""

    def __call__(self, tier: str, kept: bool, links: bytes, text: Text | None = None) -> None: ...


async def open_tiers(
    spec: PipelineSpec, arena: Arena, pool: Pool, tiers: dict[str, CircuitBreaker],
    closing: AsyncExitStack, *, namespace: bytes = b"", note: Note | None = None,
    epoch: bytes = b"",
) -> None:  # fmt: skip
    """Fill `tiers` by name; `closing` closes them. A tier is in `tiers` before it opens, when it
    tells `note` of what it kept. `namespace`: the digest that every object carries; empty: objects
    of all. `epoch`: of this pipeline's own listener. Raises ConfigError; a tier that cannot be
    reached is opened and down."""
    given_up: list[Callable[[Object], None]] = []
    for name, t in spec.tiers.items():
        make: Any = t.cls  # every tier takes (options, context)
        watch = partial(note, name) if note is not None else None
        ctx = TierContext(arena, namespace, pool, watch, epoch, given_up)
        tier = CircuitBreaker(make(t.options, ctx), name, t.breaker)
        closing.push_async_callback(tier.close)
        tiers[name] = tier
        await tier.open()
