"""Portal, pool and promises of memory: the places where threads meet."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tierloom.pipeline.run.loop_thread import Portal
from tierloom.pipeline.run.threads import Pool
from tierloom.stages.errors import ArenaFull
from tierloom.stages.memory.arena import Arena


async def until(stop: asyncio.Event, ready: Any) -> None:
    ready()
    await stop.wait()


def test_posts_arrive_in_order_and_on_the_loop() -> None:
    portal, got, done = Portal(until), [], threading.Event()
    portal.start()
    for n in range(1000):
        portal.post(lambda n=n: got.append((n, threading.current_thread().name)))
    portal.post(done.set)
    assert done.wait(5)
    portal.close()
    assert got == [(n, "tierloom-portal") for n in range(1000)]
    assert not portal.alive
    portal.post(got.clear)  # nobody is there any more: harmless
    assert got


def test_what_fails_at_the_start_is_raised_there() -> None:
    async def broken(stop: asyncio.Event, ready: Any) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Portal(broken).start()


def test_a_pool_runs_side_by_side_and_hands_errors_back() -> None:
    pool = Pool(2, "test")
    meet = threading.Barrier(2, timeout=5)

    async def life() -> None:
        await asyncio.gather(pool(meet.wait), pool(meet.wait))
        with pytest.raises(ZeroDivisionError):
            await pool(lambda: 1 // 0)
        assert await pool(sum, [1, 2]) == 3

    asyncio.run(life())
    pool.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("tierloom-test")]


def test_a_stuck_call_is_left_behind_and_a_waiting_one_is_never_begun() -> None:
    pool, go, begun = Pool(1, "test"), threading.Event(), []

    async def life() -> None:
        for call in (go.wait, lambda: begun.append(1)):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(pool(call), 0.05)
        go.set()
        assert await pool(lambda: 7) == 7

    asyncio.run(life())
    pool.close()
    assert not begun


def test_promises_of_memory_are_kept_in_order() -> None:
    arena = Arena(1 << 20, huge_pages=False)
    got = []

    async def one(n: int) -> None:
        await arena.promises.reserve(1 << 19)
        got.append(n)
        await asyncio.sleep(0.01)
        arena.promises.unreserve(1 << 19)

    async def life() -> None:
        with pytest.raises(ArenaFull, match=r"raise budget\.arena"):
            await arena.promises.reserve((1 << 20) + 1)
        await asyncio.gather(*[one(n) for n in range(8)])
        await arena.promises.reserve(1 << 20)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(arena.promises.reserve(1), 0.02)
        arena.promises.unreserve(1 << 20)
        await arena.promises.reserve(1 << 20)

    asyncio.run(life())
    assert sorted(got) == list(range(8))
    arena.close()


def test_what_fails_on_the_loop_holds_up_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A post that raised left those after it in the mailbox, until somebody posted again."""
    portal, seen = Portal(until), threading.Event()
    portal.start()

    def burst() -> None:
        portal.post(lambda: 1 / 0)
        portal.post(seen.set)

    portal.post(burst)
    assert seen.wait(5)
    assert "failed on the loop" in caplog.text
    portal.close()
    assert not portal.alive
