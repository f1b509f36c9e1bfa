"""The tiers of a file without its graphs: what the first took is safe, whatever the others do."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tierloom.pipeline.config.load import load
from tierloom.pipeline.object_store import Depot, Grip
from tierloom.stages.errors import Lost
from tierloom.stages.kv.object import Object
from tierloom.testing import NAMESPACE, SIZE, key_of, make_object

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

OTHER = b"o" * 32
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def opened(**tiers: dict[str, Any]) -> AsyncIterator[Depot]:
    source = {
        "version": 1, "budget": {"arena": 16 * 65536}, "graphs": {},
        "tiers": {name: {"capacity": 64 * SIZE} | t for name, t in tiers.items()},
    }  # fmt: skip
    depot = Depot(load(source))
    await depot.open()
    async with anyio.create_task_group() as tasks:
        depot.start(tasks)
        yield depot
        tasks.cancel_scope.cancel()
    await depot.close()


async def put(depot: Depot, seed: int, space: bytes = NAMESPACE) -> Lost | None:
    obj = make_object(depot.arena, seed)
    try:
        return await depot.put(space, obj)
    finally:
        obj.lease.release()


async def get(depot: Depot, seed: int, space: bytes = NAMESPACE) -> bytes | Lost:
    with Grip(depot.arena) as grip:
        room = await depot.make_room(space, grip, [key_of(seed)])
        got = await depot.read(space, grip, key_of(seed), room=room)
        return bytes(got.lease.view[:SIZE]) if isinstance(got, Object) else got


MEMORY = {"use": "memory"}


async def test_what_was_put_is_in_every_tier() -> None:
    async with opened(hot=MEMORY, warm=MEMORY) as depot:
        for seed in range(4):
            assert await put(depot, seed) is None
        await depot.settled()
        assert [tier.stat().objects for tier in depot.tiers] == [4, 4]
        assert depot.stat(NAMESPACE)[:2] == (4, 4 * SIZE)
        assert await depot.delete(NAMESPACE, [key_of(0), key_of(9)]) == 1
        assert await depot.clear(NAMESPACE) == 3
        assert depot.stat(NAMESPACE)[:2] == (0, 0)
        assert [tier.stat().objects for tier in depot.tiers] == [0, 0]


async def test_what_memory_evicted_comes_back_and_is_promoted(tmp_path: Path) -> None:
    warm = {"use": "files", "path": str(tmp_path)}
    async with opened(hot=MEMORY | {"capacity": 2 * SIZE}, warm=warm) as depot:
        for seed in range(6):
            assert await put(depot, seed) is None
            await depot.settled()
        for seed in range(6):
            first = await get(depot, seed)
            assert isinstance(first, bytes)
            hits = depot.tiers[0].counts.hits
            assert await get(depot, seed) == first
            assert depot.tiers[0].counts.hits == hits + 1
        assert depot.tiers[1].stat().objects == 6


async def test_a_stuck_tier_behind_memory_holds_nobody_up() -> None:
    """Nor does what waits for it pin the memory: more than a few objects are not written to it."""
    stuck = {"use": "stuck", "at": "put", "timeout": "10 s"}
    async with opened(hot=MEMORY | {"capacity": 8 * SIZE}, warm=stuck) as depot:
        with anyio.fail_after(8):
            for seed in range(40):
                assert await put(depot, seed) is None
                assert isinstance(await get(depot, seed), bytes)
        assert depot.dropped > 0
        assert 0 < depot._writing <= 2 * SIZE


async def test_a_failing_tier_is_left_out() -> None:
    for tiers in (
        {"hot": {"use": "flaky", "rate": 1.0}, "warm": MEMORY},
        {"hot": MEMORY, "warm": {"use": "flaky", "rate": 1.0}},
    ):
        async with opened(**tiers) as depot:
            for seed in range(6):
                assert await put(depot, seed) is None
            assert await depot.exists(NAMESPACE, [key_of(0), key_of(9)]) == [True, False]
            assert isinstance(await get(depot, 0), bytes)
            assert await get(depot, 9) is Lost.ABSENT
            await depot.settled()


async def test_a_full_first_tier_passes_on() -> None:
    async with opened(hot={"use": "full"}, warm=MEMORY) as depot:
        assert await put(depot, 1) is None
        assert isinstance(await get(depot, 1), bytes)


async def test_an_audited_tier_knows_objects_by_their_names(tmp_path: Path) -> None:
    files = {"use": "files", "path": str(tmp_path)}
    source = {"version": 1, "graphs": {}, "tiers": {"cold": {"use": "audit", "of": files}}}
    depot = Depot(load(source | {"budget": {"arena": "1 MiB"}}))
    await depot.open()
    assert await put(depot, 1) is None
    assert isinstance(await get(depot, 1), bytes)
    assert depot.tiers[0].counts.extra == {"differ_in": 0, "differ_out": 0}
    await depot.close()


async def test_no_room_is_told() -> None:
    """With no memory left for a colder tier's object, and never for ever."""
    async with opened(cold={"use": "slow", "delay": 0.0}) as depot:
        assert await put(depot, 1) is None
        with Grip(depot.arena) as hog:
            assert await hog.promise(depot.arena.working)
            with Grip(depot.arena) as grip, anyio.fail_after(10):
                assert not await grip.promise(4096)
        with Grip(depot.arena) as grip:
            assert await grip.promise(4096)
        assert depot.arena._reserved == 0


async def test_one_key_in_two_namespaces_is_two_objects() -> None:
    async with opened(hot=MEMORY, warm=MEMORY) as depot:
        one, two = make_object(depot.arena, 1), make_object(depot.arena, 1)
        two.header = two.header._replace(namespace=OTHER)
        two.lease.view[SIZE - 10] ^= 1
        for space, obj in ((NAMESPACE, one), (OTHER, two)):
            assert await depot.put(space, obj) is None
            obj.lease.release()
        assert isinstance(await get(depot, 1), bytes)
        assert await get(depot, 1) != await get(depot, 1, OTHER)
        assert await depot.clear(OTHER) == 1
        assert await get(depot, 1, OTHER) is Lost.ABSENT
        assert isinstance(await get(depot, 1), bytes)
