"""Blocking calls that may hang: how many run, who waits for them, and what is left behind."""

from __future__ import annotations

import threading

import anyio
import anyio.to_thread
import pytest

from tierloom.stages.errors import TierDown
from tierloom.stages.tiers.contract.tier import TierCounts
from tierloom.stages.tiers.pools import bounded_calls as calls
from tierloom.stages.tiers.pools.bounded_calls import BoundedCalls
from tierloom.testing import Pool

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


class Hanging:
    """A call that hangs until it is let go; counts those that run at once."""

    def __init__(self):
        self.go = threading.Event()
        self.began = threading.Semaphore(0)
        self.now = self.most = 0

    def __call__(self):
        self.now += 1
        self.most = max(self.most, self.now)
        self.began.release()
        assert self.go.wait(30)
        self.now -= 1
        return "done"


@pytest.fixture
def hanging():
    made = Hanging()
    yield made
    made.go.set()


async def given_up(made, call):
    """Begin a call, and give it up once it runs."""
    async with anyio.create_task_group() as group:
        group.start_soon(made, call)
        assert await anyio.to_thread.run_sync(call.began.acquire, True, 10)
        group.cancel_scope.cancel()


async def test_no_more_run_than_may(hanging):
    made, done = BoundedCalls(Pool(), 2, TierCounts()), []

    async def one():
        done.append(await made(hanging))

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(one)
        for _ in range(2):
            await anyio.to_thread.run_sync(hanging.began.acquire)
        await anyio.sleep(0.1)
        assert hanging.most == 2
        hanging.go.set()
    assert done == ["done"] * 5
    assert hanging.most == 2


async def test_calls_left_behind_keep_their_places(hanging, monkeypatch):
    monkeypatch.setattr(calls, "_PATIENCE", 0.05)
    counts = TierCounts()
    made = BoundedCalls(Pool(), 2, counts)
    await given_up(made, hanging)
    assert await made(lambda: 7) == 7, "one place is free"
    await given_up(made, hanging)
    assert counts.extra == {"abandoned": 2}
    with pytest.raises(TierDown, match="2 calls of its client do not return"):
        await made(lambda: 7)
    assert not await made.idle(0.05)
    hanging.go.set()
    assert await made.idle(10)
    assert await made(lambda: 7) == 7


async def test_a_call_given_up_a_moment_ago_is_waited_for(hanging):
    made = BoundedCalls(Pool(), 1, TierCounts())
    await given_up(made, hanging)
    threading.Timer(0.05, hanging.go.set).start()
    assert await made(lambda: 7) == 7


async def test_what_no_thread_has_begun_is_never_done():
    """Its caller is gone, and with him the memory that it would touch."""
    pool, done, counts = Pool(), [], TierCounts()
    made = BoundedCalls(pool, 1, counts)
    pool.gate.clear()
    async with anyio.create_task_group() as group:
        group.start_soon(made, done.append, 1)
        assert await anyio.to_thread.run_sync(pool.reached.wait, 10)
        group.cancel_scope.cancel()
    pool.gate.set()
    assert await made(lambda: 7) == 7
    await anyio.sleep(0.05)
    assert not done
    assert not counts.extra


async def test_what_a_call_raises_is_raised():
    made = BoundedCalls(Pool(), 1, TierCounts())
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await made(lambda: 1 // 0)
    assert await made.idle(0)
