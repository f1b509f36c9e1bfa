"""What every tier promises, as tests: subclass `TierContract`, say how one is made, they run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tierloom.stages.errors import BadObject, Damaged, Lost
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.object_reader import ReadingTier
from tierloom.stages.tiers.contract.tier import Read, Tier, TierContext
from tierloom.testing.bench import (
    ALL,
    FRAMES,
    SIZE,
    Clock,
    Pool,
    TierBench,
    encrypted_anew,
    key_of,
    links_of,
    make_object,
    verify,
)


class _Limits(NamedTuple):
    timeout: float = 10.0
    fails: int = 3
    probe: float = 1.0


class TierContract(TierBench):
    """`make` builds a tier in `folder`; the attributes say which promises it makes."""

    pytestmark = pytest.mark.anyio

    local = False
    ttl = True
    bounded = True
    damage: Any = None
    """`damage(tier, key, change)` calls `change(bytearray)` on what is kept; it may be cut."""

    async def test_what_was_put_comes_back(self, tier: Tier, arena: Arena) -> None:
        assert await self.put(tier, 1, 2, 3) == [None] * 3
        for seed in (3, 1, 2):
            assert await self.get(tier, seed) == self.bytes_of(arena, seed)
        assert tier.stat()[:2] == (3, 3 * SIZE)
        assert tier.counts.puts == 3
        assert tier.counts.hits == 3
        assert tier.counts.bytes_in == 3 * SIZE

    async def test_absent_is_data(self, tier: Tier) -> None:
        assert await self.get(tier, 1) is Lost.ABSENT
        assert await tier.exists([key_of(1)]) == [False]
        assert await tier.delete([key_of(1)]) == 0
        assert tier.counts.misses == 1

    async def test_empty_batches(self, tier: Tier) -> None:
        assert await tier.exists([]) == []
        assert await tier.put([]) == []
        await tier.read([])
        assert await tier.delete([]) == 0

    async def test_one_bad_read_spoils_no_other(self, tier: Tier, arena: Arena) -> None:
        await self.put(tier, *range(0, 20, 2))
        reads = [Read(key_of(seed), ALL) for seed in range(20)]
        await tier.read(reads)
        for seed, read in enumerate(reads):
            if seed % 2:
                assert read.object is None
                assert read.lost is Lost.ABSENT
            else:
                assert read.object is not None
                assert verify(read.object, read.key) == self.bytes_of(arena, seed)
                read.object.lease.release()
        assert await tier.exists([r.key for r in reads]) == [seed % 2 == 0 for seed in range(20)]

    async def test_a_prompt_of_which_it_has_the_beginning(self, tier: Tier) -> None:
        keys = [key_of(seed) for seed in range(12)]
        for length in range(0, 13, 3):
            assert await tier.prefix_length(keys) == length
            await self.put(tier, *range(length, min(12, length + 3)))
        assert await tier.prefix_length([]) == 0

    async def test_layer_by_layer(self, tier: Tier, arena: Arena) -> None:
        await self.put(tier, 1)
        held = await self.first_frame(tier, 1)
        for upto in (1, 2, 2, FRAMES, ALL):
            read = Read(key_of(1), upto, held)
            await tier.read([read])
            assert read.lost is None
            assert read.object is held
            assert held.loaded >= min(upto, FRAMES)
            verify(held, read.key)
        assert held.sealed
        assert verify(held, key_of(1)) == self.bytes_of(arena, 1)
        held.lease.release()

    async def test_gone_between_two_layers(self, tier: Tier) -> None:
        await self.put(tier, 1)
        held = await self.first_frame(tier, 1)
        await tier.delete([key_of(1)])
        again = Read(key_of(1), ALL, held)
        await tier.read([again])
        assert again.lost is Lost.ABSENT or held.loaded == FRAMES
        verify(held, key_of(1))
        held.lease.release()

    async def test_another_in_its_place_is_not_to_blame(
        self, ctx: TierContext, tmp_path: Path, clock: Clock
    ) -> None:
        """A header was read, and then frames of an object that has replaced it: their checksums
        fail, but what is kept now is whole, and stays."""
        tier = self.make(ctx, tmp_path, clock)
        breaker = CircuitBreaker(tier, "tier", _Limits())
        await breaker.open()
        other = encrypted_anew(ctx.arena, 1)
        try:
            await self.put(breaker, 1)
            held = await self.first_frame(breaker, 1)
            await breaker.delete([key_of(1)])
            assert await breaker.put([other]) == [None]
            await breaker.read([Read(key_of(1), ALL, held)])
            proof = Damaged("a frame's checksum does not match")
            await breaker.refused(key_of(1), proof, held.header)
            held.lease.release()
            if isinstance(tier, ReadingTier):
                await tier.expel(key_of(1), proof, b"TLM1, of another")
            assert await breaker.exists([key_of(1)]) == [True]
            await breaker.refused(key_of(1), proof, other.header)
            assert await breaker.exists([key_of(1)]) == [False]
        finally:
            other.lease.release()
            await breaker.close()

    async def test_put_twice_keeps_one(self, tier: Tier, arena: Arena) -> None:
        assert await self.put(tier, 1) == [None]
        assert await self.put(tier, 1, 2) == [None, None]
        assert tier.stat()[:2] == (2, 2 * SIZE)
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)

    async def test_unsealed_objects_are_a_mistake(self, tier: Tier, arena: Arena) -> None:
        obj = make_object(arena, 1)
        obj.sealed = False
        with pytest.raises(ValueError, match="sealed"):
            await tier.put([obj])
        obj.lease.release()

    async def test_drop_and_clear(self, tier: Tier) -> None:
        await self.put(tier, 1, 2, 3, 4)
        assert await tier.delete([key_of(1), key_of(9), key_of(2)]) == 2
        assert await tier.exists([key_of(s) for s in (1, 2, 3, 4)]) == [False, False, True, True]
        assert await tier.clear() == 2
        assert await tier.clear() == 0
        assert tier.stat()[:2] == (0, 0)
        assert await self.put(tier, 1) == [None]

    async def test_no_room_in_the_arena(self, tier: Tier, arena: Arena) -> None:
        await self.put(tier, 1)
        held = arena.lease(arena.working)
        got = await self.get(tier, 1)
        held.release()
        assert isinstance(got, bytes) if tier.in_arena else got is Lost.NO_ROOM

    async def test_time_is_over(self, ctx: TierContext, tmp_path: Path, clock: Clock) -> None:
        if not self.ttl:
            pytest.skip("no ttl")
        async with self.opened(ctx, tmp_path, clock, ttl=60.0) as tier:
            await self.put(tier, 1)
            clock.now += 59
            assert await tier.exists([key_of(1)]) == [True]
            clock.now += 2
            assert await tier.exists([key_of(1)]) == [False]
            assert await self.get(tier, 1) is Lost.ABSENT
            if tier.local:
                assert tier.find(links_of(1)) is None
            assert await self.put(tier, 1) == [None]
            assert isinstance(await self.get(tier, 1), bytes)
            assert tier.stat().objects == 1

    async def test_capacity_is_exact(self, ctx: TierContext, tmp_path: Path, clock: Clock) -> None:
        if not self.bounded:
            pytest.skip("unbounded")
        async with self.opened(ctx, tmp_path, clock, capacity=5 * SIZE) as tier:
            for seed in range(12):
                assert await self.put(tier, seed) == [None]
                assert tier.stat().nbytes <= 5 * SIZE
                kept = await tier.exists([key_of(s) for s in range(12)])
                assert sum(kept) * SIZE == tier.stat().nbytes
                if tier.local:
                    assert sum(kept) == min(seed + 1, 5)
                assert kept[seed]
            assert tier.counts.evicted >= 7

    async def test_larger_than_the_tier(
        self, ctx: TierContext, tmp_path: Path, clock: Clock
    ) -> None:
        if not self.bounded:
            pytest.skip("unbounded")
        async with self.opened(ctx, tmp_path, clock, capacity=SIZE - 4096) as tier:
            assert await self.put(tier, 1) == [Lost.NO_ROOM]
            assert await self.put(tier, 2, tokens=16) == [None]
            assert tier.counts.refused == 1

    async def test_pins(self, ctx: TierContext, tmp_path: Path, clock: Clock) -> None:
        if not self.local:
            pytest.skip("cannot pin")
        async with self.opened(ctx, tmp_path, clock, capacity=4 * SIZE) as tier:
            await self.put(tier, 1, 2)
            assert tier.pin([key_of(1), key_of(2), key_of(9)]) == 2
            await self.put(tier, *range(10, 20))
            assert await tier.exists([key_of(1), key_of(2)]) == [True, True]
            assert tier.pin([key_of(1)], pinned=False) == 1
            await self.put(tier, *range(20, 30))
            assert await tier.exists([key_of(1), key_of(2)]) == [False, True]
            assert tier.pin([key_of(s) for s in range(20, 30)]) == 3
            assert await self.put(tier, 40) == [Lost.NO_ROOM]

    async def test_inner_links(self, tier: Tier) -> None:
        if not self.local:
            with pytest.raises(NotImplementedError):
                tier.find(links_of(1))
            return
        await self.put(tier, 1)
        links = links_of(1)
        assert tier.find(links) == (key_of(1), 4, SIZE)
        other = links[:64] + links_of(2)[64:]
        assert tier.find(other) == (key_of(1), 2, SIZE)
        await self.put(tier, 1, tokens=32)  # a shorter one of its own is preferred
        assert tier.find(other) == (key_of(1, 32), 2, 4096 + FRAMES * 8192)
        assert tier.find(links_of(2)) is None
        await tier.delete([key_of(1)])
        assert tier.find(links) == (key_of(1, 32), 2, 4096 + FRAMES * 8192)

    async def test_a_cancelled_put_is_whole_or_invisible(
        self, tier: Tier, arena: Arena, pool: Pool
    ) -> None:
        pool.gate.clear()
        pool.reached.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(self.put, tier, 1, 2)
            await _patient(pool.reached.is_set)
            group.cancel_scope.cancel()
        pool.gate.set()
        for _ in range(20):
            for seed in (1, 2):
                got = await self.get(tier, seed)
                assert got in (Lost.ABSENT, self.bytes_of(arena, seed))
            await anyio.sleep(0.002)
        assert await self.put(tier, 1, 2) == [None, None]

    async def test_a_cancelled_read_leaves_nothing(self, tier: Tier, pool: Pool) -> None:
        await self.put(tier, 1, 2)
        pool.gate.clear()
        pool.reached.clear()
        reads = [Read(key_of(1), ALL), Read(key_of(2), ALL)]
        async with anyio.create_task_group() as group:
            group.start_soon(tier.read, reads)
            await _patient(lambda: pool.reached.is_set() or reads[0].object is not None)
            group.cancel_scope.cancel()
        pool.gate.set()
        for read in reads:
            if read.object is not None:
                read.object.lease.release()
        assert isinstance(await self.get(tier, 1), bytes)

    async def test_many_at_once(self, ctx: TierContext, tmp_path: Path, clock: Clock) -> None:
        """Puts, reads and drops of a few keys by many tasks: never a wrong byte."""
        right = {seed: self.bytes_of(ctx.arena, seed) for seed in range(12)}

        async def client(number: int) -> None:
            rng = random.Random(number)
            for _ in range(12):
                seed = rng.randrange(12)
                what = rng.random()
                if what < 0.5:
                    assert await self.get(tier, seed) in (Lost.ABSENT, right[seed])
                elif what < 0.9:
                    assert (await self.put(tier, seed))[0] in (None, Lost.NO_ROOM)
                else:
                    await tier.delete([key_of(seed)])

        bound = {"capacity": 6 * SIZE} if self.bounded else {}
        async with self.opened(ctx, tmp_path, clock, **bound) as tier:
            async with anyio.create_task_group() as group:
                for number in range(6):
                    group.start_soon(client, number)
            assert tier.stat().nbytes <= (6 if self.bounded else 12) * SIZE

    @settings(
        max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        kind=st.sampled_from(["flip", "cut", "zero"]),
        at=st.integers(0, SIZE - 1),
        bit=st.integers(0, 7),
    )
    async def test_damage_is_a_miss(self, tier: Tier, kind: str, at: int, bit: int) -> None:
        if self.damage is None:
            pytest.skip("cannot be damaged")

        def change(raw: bytearray) -> None:
            if kind == "flip":
                raw[at] ^= 1 << bit
            elif kind == "zero":
                raw[at:] = bytes(len(raw) - at)
            else:
                del raw[at:]

        await self.put(tier, 1)
        right = self.bytes_of(tier.ctx.arena, 1)
        self.damage(tier, key_of(1), change)
        try:
            # The padding of a header is under its checksum; a frame here fills its pages.
            assert await self.get(tier, 1) in (Lost.CORRUPT, Lost.ABSENT, right)
        except BadObject:
            await tier.delete([key_of(1)])  # what a reader does
        assert await self.get(tier, 1) in (Lost.ABSENT, right)
        await tier.clear()

    async def test_what_is_of_a_later_format_stays(self, tier: Tier, arena: Arena) -> None:
        """It may be whole, for whoever knows the format: a miss, and nothing is put over it."""
        if self.damage is None:
            pytest.skip("cannot be damaged")
        await self.put(tier, 1)
        self.damage(tier, key_of(1), lambda raw: raw.__setitem__(4, 4))
        for _ in range(2):
            try:
                assert await self.get(tier, 1) is Lost.NEWER
            except BadObject:
                assert tier.in_arena  # whoever reads memory checks its header himself
            assert await tier.exists([key_of(1)]) == [True]
            assert await self.put(tier, 1) == [None]
        assert tier.counts.corrupt == 0
        self.damage(tier, key_of(1), lambda raw: raw.__setitem__(4, 1))
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)

    async def test_swapped_objects_are_misses(self, tier: Tier) -> None:
        if self.damage is None:
            pytest.skip("cannot be damaged")
        await self.put(tier, 1, 2)
        seen: list[bytes] = []
        self.damage(tier, key_of(1), lambda raw: seen.append(bytes(raw)))
        self.damage(tier, key_of(2), lambda raw: seen.append(bytes(raw)))
        self.damage(tier, key_of(1), lambda raw: raw.__setitem__(slice(None), seen[1]))
        self.damage(tier, key_of(2), lambda raw: raw.__setitem__(slice(None), seen[0]))
        for seed in (1, 2):
            try:
                assert await self.get(tier, seed) is Lost.CORRUPT
            except BadObject:  # noqa: PERF203
                assert tier.in_arena  # whoever reads memory checks its header himself


async def _patient(ready: Callable[[], bool]) -> None:
    """Wait a moment for `ready`; tiers without threads never are."""
    for _ in range(50):
        if ready():
            return
        await anyio.sleep(0.002)
