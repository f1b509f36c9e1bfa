"""Objects that colder tiers have, brought into memory before anybody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import xxhash
from anyio.lowlevel import checkpoint

from tierloom.stages.errors import Damaged, InputError
from tierloom.stages.kv.object import Object
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import Read

_AT_ONCE = 32
"""Keys that a tier is asked for in one call."""
_WHOLE = 1 << 30


async def promote_keys(
    keys: Sequence[bytes], tiers: Mapping[str, CircuitBreaker], nbytes: int,
    told: Callable[[int], None],
) -> dict[str, int]:  # fmt: skip
    """What became of each: it was in memory already (`there`), came (`objects`), nobody had it
    (`absent`), or there was no room, or no whole copy (`refused`). `nbytes`: of an object at most,
    to be promised by the arena. `told`: after each part, how many are done. On the tiers' loop.
    Raises InputError."""
    memory = next((t for t in tiers.values() if t.in_arena), None)
    if memory is None:
        raise InputError("prefetch: this pipeline has no memory tier")
    counts = dict.fromkeys(("there", "objects", "absent", "refused"), 0)
    for at in range(0, len(keys), _AT_ONCE):
        part = list(dict.fromkeys(keys[at : at + _AT_ONCE]))
        left = [key for key in part if (f := memory.find(key)) is None or f.key != key]
        counts["there"] += len(part) - len(left)
        for tier in tiers.values():
            if tier is memory or not left or not tier.available:
                continue
            found = [k for k, there in zip(left, await tier.exists(left), strict=True) if there]
            for key in found:
                came = await _promote(key, tier, memory, nbytes)
                counts["objects" if came else "refused"] += 1
                left.remove(key)
        counts["absent"] += len(left)
        told(min(at + _AT_ONCE, len(keys)))
        await checkpoint()
    return counts


async def _promote(key: bytes, tier: CircuitBreaker, memory: CircuitBreaker, nbytes: int) -> bool:
    """Requests go first: nobody waits for room here."""
    arena = memory.ctx.arena
    if not memory.takes or not arena.promises.try_reserve(nbytes):
        return False
    read = Read(key, _WHOLE)
    try:
        await tier.read([read])
        obj = read.object
        if obj is None or obj.loaded < len(obj.header.frames) or obj.lease.arena is not arena:
            return False
        bad: int = await tier.ctx.pool(_first_bad, obj, leases=(obj.lease,))
        if bad >= 0:
            proof = Damaged(f"frame {bad} does not match its checksum")
            await tier.refused(key, proof, obj.header)
            return False
        obj.sealed = True
        return (await memory.put([obj]))[0] is None
    finally:
        if read.object is not None:
            read.object.lease.release()
        arena.promises.unreserve(nbytes)


def _first_bad(obj: Object) -> int:
    """The first frame that does not match its checksum; -1: all do."""
    for i, frame in enumerate(obj.header.frames):
        stored = obj.lease.view[frame.offset : frame.offset + frame.stored]
        if xxhash.xxh3_64_intdigest(stored) != frame.checksum:
            return i
    return -1
