"""A tier beside the bare client of its store: CPU seconds of either per GB, and their ratio.

A round stores 8 objects of 32 MiB by the bare client and then by the tier, and reads them back by
both, so that all four see the same noise. The bare client does what the tier must at least: the
same requests, as many at once, into memory that nobody looks at. The tier does the rest, too:
names, sizes, headers, and every byte in the lease it is served from, where it is compared with what
was stored. The server's CPU time is not counted; it has no part in the ratio.
"""

from __future__ import annotations

import asyncio
import ctypes
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from remote.clients import COUNT, SLOT, Bare, Obstore
from remote.nixl_clients import Nixl, NixlObjects
from remote.places import PLACES
from remote.pool_clients import Infinistore, Mooncake
from yardstick import GB

from tierloom.pipeline.run.threads import Pool
from tierloom.stages import catalog
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.object import Header, Object, plan_frames
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import Read, Tier, TierContext

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

GEOMETRY = Geometry(kv=2, layers=32, heads=8, dim=128, dtype="bfloat16", block_tokens=1)
SPACE = b"b" * 32
CLIENTS: dict[str, type[Bare]] = {
    "s3": Obstore,
    "nixl-posix": Nixl,
    "nixl-obj": NixlObjects,
    "mooncake": Mooncake,
    "infinistore": Infinistore,
}


def beside(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    arena = Arena((3 * COUNT + 1) * SLOT)
    pool = Pool(4, "io")
    with PLACES[name](folder / "place", 2 * COUNT * SLOT) as place:
        options = dict(place.options)
        cls = catalog.load_class("tier", options.pop("use"))
        tier = cls(cls.Options(**options), TierContext(arena, SPACE, pool))
        (folder / "bare").mkdir(parents=True)
        bare = CLIENTS[name](place.options, tier, folder / "bare")
        try:
            return asyncio.run(turns(tier, bare, arena, rounds))
        finally:
            bare.close()
            pool.close()


async def turns(tier: Tier, bare: Bare, arena: Arena, rounds: int) -> dict[str, Any]:
    """`store` and `retrieve`: medians of CPU seconds per GB and of GB/s, of the tier and `bare_`;
    `ratio`: the median of the rounds' own."""
    await tier.open()
    kept = objects(arena)
    size = sum(obj.header.nbytes for obj in kept) / GB
    took: dict[str, list[tuple[float, float]]] = {}

    async def timed(what: str, cpu: Callable[[], float], work: Awaitable[Any]) -> Any:
        before, begun = cpu(), time.perf_counter()
        result = await work
        wall = time.perf_counter() - begun
        took.setdefault(what, []).append(((cpu() - before) / size, size / wall))
        return result

    for turn in range(rounds + 1):
        named = [(f"{turn}-{n}", obj) for n, obj in enumerate(kept)]
        await timed("bare store", bare.cpu, bare.put(named))
        lost = await timed("store", time.process_time, tier.put(kept))
        assert lost == [None] * COUNT, lost
        await timed("bare retrieve", bare.cpu, bare.get(named))
        reads = [Read(obj.header.key, 1 << 30) for obj in kept]
        await timed("retrieve", time.process_time, tier.read(reads))
        for read, obj in zip(reads, kept, strict=True):
            assert read.object is not None, read.lost
            assert np.array_equal(words(read.object), words(obj)), "other bytes came back"
            read.object.lease.release()
        assert await tier.delete([obj.header.key for obj in kept]) == COUNT
        await bare.drop(named)
        if not turn:
            took.clear()  # the first touch of memory and files
    await tier.close()
    return {what: figures(took[what], took[f"bare {what}"]) for what in ("store", "retrieve")}


def figures(ours: list[tuple[float, float]], bare: list[tuple[float, float]]) -> dict[str, float]:
    made = {}
    for who, rows in (("", ours), ("bare_", bare)):
        cpu, rate = map(statistics.median, zip(*rows, strict=True))
        made |= {f"{who}cpu_s_per_gb": cpu, f"{who}gb_per_s": rate}
    ratios = [a[0] / b[0] for a, b in zip(ours, bare, strict=True)]
    return made | {"ratio": statistics.median(ratios)}


def words(obj: Object) -> np.ndarray:
    return np.frombuffer(obj.lease.view, np.uint64)


def objects(arena: Arena) -> list[Object]:
    """Sealed objects of 256 tokens of Llama-3.1-8B."""
    made = []
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        raw = [GEOMETRY.frame_bytes(4, 256)] * 8
        key = n.to_bytes(32, "little")
        header = Header(
            key=key, namespace=SPACE, parent=b"p" * 32, token_digest=b"t" * 32, tokens=256,
            grain=256, group=4, geometry=GEOMETRY, frames=plan_frames(4096, raw, raw), links=key,
        )  # fmt: skip
        obj = Object(header, arena.lease(header.nbytes))
        ctypes.memset(obj.lease.address, 0, header.nbytes)
        view = words(obj)
        view[:] = rng.integers(0, 1 << 63, len(view), dtype=np.uint64)
        frames = [obj.lease.view[f.offset : f.offset + f.stored] for f in header.frames]
        obj.seal([xxhash.xxh3_64_intdigest(frame) for frame in frames])
        made.append(obj)
    return made
