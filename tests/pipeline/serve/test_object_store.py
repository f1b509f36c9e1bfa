"""The tiers of a file without its graphs: what the first took is safe, whatever the others do."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.serve.object_store import MemoryReservation, ObjectStore
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
async def opened(**tiers: dict[str, Any]) -> AsyncIterator[ObjectStore]:
    source = {
        "version": 1, "budget": {"arena": 16 * 65536}, "graphs": {},
        "tiers": {name: {"capacity": 64 * SIZE} | t for name, t in tiers.items()},
    }  # fmt: skip
    store = ObjectStore(load_config(source))
    await store.open()
    async with anyio.create_task_group() as tasks:
        store.start(tasks)
        yield store
        tasks.cancel_scope.cancel()
    await store.close()


async def put(store: ObjectStore, seed: int, space: bytes = NAMESPACE) -> Lost | None:
    obj = make_object(store.arena, seed)
    try:
        return await store.put(space, obj)
    finally:
        obj.lease.release()


async def get(store: ObjectStore, seed: int, space: bytes = NAMESPACE) -> bytes | Lost:
    with MemoryReservation(store.arena) as reservation:
        room = await store.make_room(space, reservation, [key_of(seed)])
        got = await store.read(space, reservation, key_of(seed), room=room)
        return bytes(got.lease.view[:SIZE]) if isinstance(got, Object) else got


MEMORY = {"use": "memory"}


async def test_what_was_put_is_in_every_tier() -> None:
    async with opened(hot=MEMORY, warm=MEMORY) as store:
        for seed in range(4):
            assert await put(store, seed) is None
        await store.settled()
        assert [tier.stat().objects for tier in store.tiers] == [4, 4]
        assert store.stat(NAMESPACE)[:2] == (4, 4 * SIZE)
        assert await store.delete(NAMESPACE, [key_of(0), key_of(9)]) == 1
        assert await store.clear(NAMESPACE) == 3
        assert store.stat(NAMESPACE)[:2] == (0, 0)
        assert [tier.stat().objects for tier in store.tiers] == [0, 0]


async def test_what_memory_evicted_comes_back_and_is_promoted(tmp_path: Path) -> None:
    warm = {"use": "files", "path": str(tmp_path)}
    async with opened(hot=MEMORY | {"capacity": 2 * SIZE}, warm=warm) as store:
        for seed in range(6):
            assert await put(store, seed) is None
            await store.settled()
        for seed in range(6):
            first = await get(store, seed)
            assert isinstance(first, bytes)
            hits = store.tiers[0].counts.hits
            assert await get(store, seed) == first
            assert store.tiers[0].counts.hits == hits + 1
        assert store.tiers[1].stat().objects == 6


async def test_a_stuck_tier_behind_memory_holds_nobody_up() -> None:
    """Nor does what waits for it pin the memory: more than a few objects are not written to it."""
    stuck = {"use": "stuck", "at": "put", "timeout": "10 s"}
    async with opened(hot=MEMORY | {"capacity": 8 * SIZE}, warm=stuck) as store:
        with anyio.fail_after(8):
            for seed in range(40):
                assert await put(store, seed) is None
                assert isinstance(await get(store, seed), bytes)
        assert store.dropped > 0
        assert 0 < store._writing <= 2 * SIZE


async def test_a_failing_tier_is_left_out() -> None:
    for tiers in (
        {"hot": {"use": "flaky", "rate": 1.0}, "warm": MEMORY},
        {"hot": MEMORY, "warm": {"use": "flaky", "rate": 1.0}},
    ):
        async with opened(**tiers) as store:
            for seed in range(6):
                assert await put(store, seed) is None
            assert await store.exists(NAMESPACE, [key_of(0), key_of(9)]) == [True, False]
            assert isinstance(await get(store, 0), bytes)
            assert await get(store, 9) is Lost.ABSENT
            await store.settled()


async def test_a_full_first_tier_passes_on() -> None:
    async with opened(hot={"use": "full"}, warm=MEMORY) as store:
        assert await put(store, 1) is None
        assert isinstance(await get(store, 1), bytes)


async def test_an_audited_tier_knows_objects_by_their_names(tmp_path: Path) -> None:
    files = {"use": "files", "path": str(tmp_path)}
    source = {"version": 1, "graphs": {}, "tiers": {"cold": {"use": "audit", "of": files}}}
    store = ObjectStore(load_config(source | {"budget": {"arena": "1 MiB"}}))
    await store.open()
    assert await put(store, 1) is None
    assert isinstance(await get(store, 1), bytes)
    assert store.tiers[0].counts.extra == {"differ_in": 0, "differ_out": 0}
    await store.close()


async def test_no_room_is_told() -> None:
    """With no memory left for a colder tier's object, and never for ever."""
    async with opened(cold={"use": "slow", "delay": 0.0}) as store:
        assert await put(store, 1) is None
        with MemoryReservation(store.arena) as hog:
            assert await hog.promise(store.arena.working)
            with MemoryReservation(store.arena) as reservation, anyio.fail_after(10):
                assert not await reservation.promise(4096)
        with MemoryReservation(store.arena) as reservation:
            assert await reservation.promise(4096)
        assert store.arena.promises.spare == store.arena.working


async def test_one_key_in_two_namespaces_is_two_objects() -> None:
    async with opened(hot=MEMORY, warm=MEMORY) as store:
        one, two = make_object(store.arena, 1), make_object(store.arena, 1)
        two.header = two.header._replace(namespace=OTHER)
        two.lease.view[SIZE - 10] ^= 1
        for space, obj in ((NAMESPACE, one), (OTHER, two)):
            assert await store.put(space, obj) is None
            obj.lease.release()
        assert isinstance(await get(store, 1), bytes)
        assert await get(store, 1) != await get(store, 1, OTHER)
        assert await store.clear(OTHER) == 1
        assert await get(store, 1, OTHER) is Lost.ABSENT
        assert isinstance(await get(store, 1), bytes)
