"""memory: the contract, and what is its own."""

from __future__ import annotations

import random
import threading

import anyio
import pytest

from tierloom.stages.errors import ArenaFull, Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import Read, TierContext
from tierloom.stages.tiers.memory.lent import Lent
from tierloom.stages.tiers.memory.tier import Memory, MemoryOptions
from tierloom.testing import FRAMES, NAMESPACE, SIZE, TierBench, TierContract, key_of, make_object


class TestMemory(TierContract):
    local = True

    def make(self, ctx, folder, clock, *, capacity=32 * SIZE, **options):
        return Memory(MemoryOptions(capacity=capacity, **options), ctx, clock=clock)

    def damage(self, tier, key, change):
        entry = tier._index.get(key)
        raw = bytearray(entry.place.lease.view)
        change(raw)
        entry.place.lease.view[: len(raw)] = raw
        entry.place.lease.view[len(raw) :] = bytes(entry.nbytes - len(raw))

    @pytest.mark.anyio
    async def test_nothing_is_copied(self, tier, arena):
        obj = make_object(arena, 1)
        await tier.put([obj])
        read = Read(key_of(1), 1)
        await tier.read([read])
        assert read.object.lease is obj.lease
        assert read.object.loaded == FRAMES
        read.object.lease.release()
        obj.lease.release()
        assert arena.leases == 1
        assert arena.flight == 0

    @pytest.mark.anyio
    async def test_what_is_read_is_not_evicted(self, ctx, tmp_path, clock):
        async with self.opened(ctx, tmp_path, clock, capacity=2 * SIZE) as tier:
            await self.put(tier, 1, 2)
            reads = [Read(key_of(1), 1)]
            await tier.read(reads)
            await self.put(tier, 3)
            assert await tier.exists([key_of(s) for s in (1, 2, 3)]) == [True, False, True]
            reads[0].object.lease.release()

    @pytest.mark.anyio
    async def test_head_of_the_prompt_stays_longest(self, ctx, tmp_path, clock):
        async with self.opened(ctx, tmp_path, clock, capacity=4 * SIZE) as tier:
            await self.put(tier, 1, 2, 3, 4)
            await self.put(tier, 5, 6)
            assert await tier.exists([key_of(s) for s in (1, 2, 3, 4)]) == [
                True,
                True,
                False,
                False,
            ]
            tier.touch([key_of(2), key_of(1)])
            await self.put(tier, 7, 8)
            assert await tier.exists([key_of(s) for s in (1, 2, 5, 6)]) == [
                True,
                True,
                False,
                False,
            ]

    @pytest.mark.anyio
    async def test_two_memory_tiers_share_a_lease(self, ctx, tmp_path, clock, arena):
        async with (
            self.opened(ctx, tmp_path, clock) as one,
            self.opened(ctx, tmp_path, clock) as two,
        ):
            obj = make_object(arena, 1)
            await one.put([obj])
            await two.put([obj])
            obj.lease.release()
            assert arena.flight == 0
            await one.delete([key_of(1)])
            assert arena.flight == 0
            assert arena.leases == 1

    @pytest.mark.anyio
    async def test_two_that_keep_the_same_leases_evict(self, ctx, tmp_path, clock, arena):
        """What the other keeps is in nobody's use."""
        async with (
            self.opened(ctx, tmp_path, clock, capacity=8 * SIZE) as one,
            self.opened(ctx, tmp_path, clock, capacity=8 * SIZE) as two,
        ):
            for seed in range(20):
                obj = make_object(arena, seed)
                assert await one.put([obj]) == [None]
                assert await two.put([obj]) == [None]
                obj.lease.release()
            assert one.counts.evicted == two.counts.evicted > 0
            assert arena.flight == 0


def test_threads_lease_while_the_tier_changes():
    """The engine's thread leases, which evicts, while the loop puts, reads and drops."""
    arena = Arena(6 * SIZE, 12 * SIZE, huge_pages=False)
    tier = Memory(MemoryOptions(capacity=12 * SIZE), TierContext(arena, NAMESPACE, None))
    stop, leased, bench = threading.Event(), [0], TierBench()

    def engine():
        rng = random.Random(0)
        while not stop.is_set():
            try:
                lease = arena.lease(rng.randint(1, 3 * SIZE))
            except ArenaFull:
                continue
            leased[0] += 1
            lease.release()

    async def loop():
        await tier.open()
        rng = random.Random(1)
        right = {seed: bench.bytes_of(arena, seed) for seed in range(30)}
        for _ in range(600):
            seed = rng.randrange(30)
            try:
                await bench.put(tier, seed, tokens=rng.choice([64, 32]))
            except ArenaFull:
                continue
            assert await bench.get(tier, seed) in (Lost.ABSENT, right[seed])
            if rng.random() < 0.1:
                await tier.delete([key_of(rng.randrange(30))])
            assert tier.stat().nbytes <= 12 * SIZE
        await tier.close()

    thread = threading.Thread(target=engine)
    thread.start()
    try:
        anyio.run(loop)
    finally:
        stop.set()
        thread.join()
    assert leased[0]
    assert arena.leases == arena.flight == 0


@pytest.mark.parametrize("options", [{"capacity": 0}, {"evict": "best"}, {"ttl": -1.0}])
def test_bad_options(options):
    with pytest.raises(ValueError):
        MemoryOptions(**({"capacity": 1} | options))


@pytest.mark.parametrize("evict", ["lru", "s3-fifo"])
@pytest.mark.parametrize("mixed", [False, True], ids=["equal", "mixed"])
def test_the_capacity_is_used(evict, mixed):
    """Full chunks and random tails through a nearly full arena: 97 % of the capacity hold objects.

    Once the arena is full every lease needs a hole, which `reclaim` may have to make.
    """
    pages, chunks = 33, 256

    class Named:
        def __init__(self, number, nbytes):
            self.key = self.links = number.to_bytes(32, "big")
            self.text = None
            self.nbytes, self.frames = nbytes, ()

    async def fill():
        capacity = chunks * pages * PAGE
        arena = Arena(8 * pages * PAGE, capacity, huge_pages=False)
        tier = Memory(
            MemoryOptions(capacity=capacity, evict=evict), TierContext(arena, NAMESPACE, None)
        )
        await tier.open()
        rng, number, shares = random.Random(1), 0, []
        for turn in range(1200):
            objects = []
            for size in [pages] * rng.randint(0, 5) + [rng.randrange(1, pages) if mixed else pages]:
                number += 1
                lease = arena.lease(size * PAGE)
                header = Named(number, size * PAGE)
                objects.append(Object(header, lease, sealed=True))
            assert await tier.put(objects) == [None] * len(objects)
            for obj in objects:
                obj.lease.release()
            assert tier.stat().nbytes <= capacity
            if turn >= 600:
                shares.append(tier.stat().nbytes / capacity)
        await tier.close()
        assert arena.leases == 0
        return sum(shares) / len(shares)

    share = anyio.run(fill)
    assert share >= 0.97
    print(f"resident share, {evict}, {'mixed' if mixed else 'equal'} sizes: {share:.4f}")


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_is_lent_goes_first(anyio_backend) -> None:
    """Where memory is needed, though it came last; and it takes no more than is idle."""
    arena = Arena(2 * SIZE, 6 * SIZE, huge_pages=False)
    ctx = TierContext(arena, NAMESPACE, anyio.to_thread.run_sync)
    own, lent = Memory(MemoryOptions(capacity=6 * SIZE), ctx), Lent(100 * SIZE, ctx)
    await own.open()
    await lent.open()

    async def put(tier, *seeds):
        for seed in seeds:
            obj = make_object(arena, seed)
            assert await tier.put([obj]) == [None]
            obj.lease.release()

    await put(own, 1, 2)
    assert lent.make_way(4 * SIZE)
    await put(lent, *range(11, 15))
    assert (lent.stat().objects, arena.idle) == (4, 0)
    assert lent.make_way(SIZE), "what was put first makes way"
    assert (lent.stat().objects, await lent.exists([key_of(11)])) == (3, [False])
    await put(lent, 15)
    await put(own, *range(3, 7))
    assert (own.stat().objects, own.counts.evicted) == (6, 0)
    assert lent.stat().objects == 2, "the others gave their places"
    with pytest.raises(ArenaFull, match="no hole"):
        arena.lease(SIZE, evict=False)
    assert lent.stat().objects == 2
    leases = [arena.lease(SIZE) for _ in range(2)]
    assert (own.stat().objects, lent.stat().objects) == (6, 0)
    for lease in leases:
        lease.release()
    assert not lent.make_way(SIZE), "nothing is idle"
    for tier in (own, lent):
        await tier.close()
    assert (arena.leases, arena.idle) == (0, 6 * SIZE)
    assert not arena.reclaim
