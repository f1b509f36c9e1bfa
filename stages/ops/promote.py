"""What a retrieve leaves in the tiers: whole objects in memory, damaged ones nowhere."""

from __future__ import annotations

from collections.abc import Mapping

from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.kv.object import Object
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker


async def settle(
    chunks: list[Chunk], tiers: Mapping[str, CircuitBreaker], promote_to: str | None, arena: Arena
) -> None:
    """Tell each tier which of its objects could not be used, and put those that a colder tier
    delivered into the memory tier `promote_to`, in place: the lease that was read into is kept."""
    promoted: list[Object] = []
    for chunk in chunks:
        if chunk.object is None or chunk.source is None:
            continue
        tier = next(iter(chunk.took))
        if chunk.refused is not None:
            await tiers[tier].refused(chunk.source.key, chunk.refused, chunk.object.header)
        elif tier != promote_to and _may_be_kept(chunk, chunk.object, arena):
            chunk.object.sealed = True
            promoted.append(chunk.object)
    if promoted and promote_to is not None:
        await tiers[promote_to].put(promoted)


def _may_be_kept(chunk: Chunk, object: Object, arena: Arena) -> bool:
    """Whether an object was read to its end and placed to its last frame, in memory of our own:
    keeping what is mapped from another process of this host would gain nothing."""
    whole = bool(chunk.nbytes) and object.loaded == len(object.header.frames)
    return whole and object.lease.arena is arena
