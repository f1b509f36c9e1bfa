"""Promises of memory: first come, first served, and stores never hold all of it."""

from __future__ import annotations

import random

import anyio
import pytest

from tierloom.stages.errors import ArenaFull
from tierloom.stages.memory.memory_promises import MemoryPromises

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


async def waits(tasks, work, *args, **options):
    """Start it; it must not end at once."""
    done = anyio.Event()

    async def run():
        await work(*args, **options)
        done.set()

    tasks.start_soon(run)
    await anyio.wait_all_tasks_blocked()
    assert not done.is_set()
    return done


async def test_small_ones_do_not_pass_a_large_one():
    promises = MemoryPromises(100)
    await promises.reserve(60)
    async with anyio.create_task_group() as tasks:
        large = await waits(tasks, promises.reserve, 80)
        small = await waits(tasks, promises.reserve, 10)
        assert not promises.try_store(1)
        promises.unreserve(60)
        await large.wait()
        await small.wait()
    assert promises.spare == 10


async def test_stores_leave_room_for_loads():
    promises = MemoryPromises(100)
    await promises.reserve(60, storing=True)
    async with anyio.create_task_group() as tasks:
        store = await waits(tasks, promises.reserve, 30, storing=True)
        later = await waits(tasks, promises.reserve, 1, storing=True)
        await promises.reserve(40)  # at once: stores wait for stores alone
        promises.unreserve(40)
        promises.unreserve(60, storing=True)
        await store.wait()
        await later.wait()
    promises.unreserve(31, storing=True)
    await promises.reserve(100, storing=True)  # one alone may have it all
    assert promises.spare == 0


async def test_who_goes_away_holds_up_nobody():
    promises = MemoryPromises(100)
    await promises.reserve(100)
    async with anyio.create_task_group() as tasks:
        with anyio.move_on_after(0.01) as scope:
            await promises.reserve(90)
        assert scope.cancelled_caught
        after = await waits(tasks, promises.reserve, 5)
        promises.unreserve(10)
        await after.wait()
    assert promises.spare == 5
    with pytest.raises(ArenaFull, match=r"raise budget\.arena"):
        await promises.reserve(101)


@pytest.mark.parametrize("seed", range(5))
async def test_in_turn(seed):
    """Random requests, some of which give up, before and after they were promised anything."""
    rng, promises = random.Random(seed), MemoryPromises(1000)
    asked, got = {False: [], True: []}, {False: [], True: []}

    async def one(number):
        storing, nbytes = rng.random() < 0.5, rng.randint(1, 400)
        asked[storing].append(number)
        with anyio.move_on_after(rng.choice([0, 0.001, 0.003, 9])):
            await promises.reserve(nbytes, storing=storing)
            got[storing].append(number)
            assert promises.spare >= 0
            try:
                await anyio.sleep(rng.choice([0, 0.0005]))
            finally:
                promises.unreserve(nbytes, storing=storing)

    async with anyio.create_task_group() as tasks:
        for number in range(1000):
            tasks.start_soon(one, number)
            if number % 50 == 0:
                await anyio.sleep(0.001)
    assert promises.spare == 1000
    for storing in (False, True):
        assert len(got[storing]) > 50
        assert got[storing] == sorted(got[storing])
    assert promises.try_store(1000), "nobody waits any more"
