"""Whatever a client raises is a failure of its tier, and never the end of a task or a thread."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import anyio
import anyio.lowlevel
import pytest

from tierloom.pipeline.run.threads import Pool
from tierloom.stages.errors import Lost
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.client_errors import is_failure
from tierloom.stages.tiers.contract.concurrently import map_concurrently
from tierloom.stages.tiers.memory.tier import Memory, MemoryOptions
from tierloom.testing import SIZE, TierBench, key_of


class PanicException(BaseException):
    """As pyo3, with which Rust libraries are called, makes of a panic."""


ERRORS = [PanicException("index out of bounds"), asyncio.CancelledError(), RuntimeError("closed")]


@pytest.fixture
def anyio_backend():
    return "asyncio"  # trio's Cancelled cannot be raised by others


@pytest.mark.anyio
class TestForeignErrors(TierBench):
    @pytest.fixture
    def anyio_backend(self):
        return "asyncio"

    def make(self, ctx, folder, clock, **_):
        limits = SimpleNamespace(timeout=0.5, fails=3, probe=5.0)
        tier = Memory(MemoryOptions(capacity=8 * SIZE), ctx)
        return CircuitBreaker(tier, "hot", limits, clock=clock)

    @pytest.mark.parametrize("error", ERRORS, ids=repr)
    @pytest.mark.parametrize("call", ["open", "exists", "read", "put", "delete", "close"])
    async def test_each_call(self, tier, caplog, monkeypatch, call, error):
        await self.put(tier, 1)

        async def broken(*_):
            await anyio.lowlevel.checkpoint()
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(tier.tier, call, broken)
            if call == "open":
                await tier.open()
                assert not tier.available
            elif call == "close":
                await tier.close()
                assert "tier hot did not close: " in caplog.text
            elif call == "read":
                assert await self.get(tier, 1) is Lost.TIER_DOWN
            elif call == "put":
                assert await self.put(tier, 2) == [Lost.TIER_DOWN]
            else:
                assert not await {
                    "exists": lambda: tier.exists([]), "delete": lambda: tier.delete([key_of(1)])
                }[call]()  # fmt: skip
        if call in ("exists", "read", "put", "delete"):
            assert type(error).__name__ in caplog.text
            assert isinstance(await self.get(tier, 1), bytes)

    async def test_who_is_cancelled_still_is(self, tier, monkeypatch):
        """By a scope, by the task itself, and by asyncio's end."""

        async def hangs(*_):
            await anyio.sleep(30)

        monkeypatch.setattr(tier.tier, "exists", hangs)
        with anyio.move_on_after(0.01) as scope:
            await tier.exists([key_of(1)])
        assert scope.cancelled_caught
        task = asyncio.ensure_future(tier.exists([key_of(1)]))
        await anyio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert tier.available
        assert await tier.exists([key_of(1)]) == [False], "it is late"


@pytest.mark.anyio
@pytest.mark.parametrize("error", ERRORS, ids=repr)
async def test_one_of_many_is_raised_as_it_is(error):
    async def work(n):
        await anyio.lowlevel.checkpoint()
        if n == 3:
            raise error
        return n

    with pytest.raises(type(error)) as caught:
        await map_concurrently(work, range(8), 4)
    assert caught.value is error


@pytest.mark.anyio
@pytest.mark.parametrize(
    "error", [*ERRORS, StopIteration(7), SystemExit(1), KeyboardInterrupt()], ids=repr
)
async def test_a_call_in_a_thread(error):
    """The caller hears of it, and the thread takes the next call."""
    pool = Pool(1, "test")

    def broken():
        raise error

    wanted = RuntimeError if isinstance(error, StopIteration) else type(error)
    if isinstance(error, (SystemExit, KeyboardInterrupt)):  # a task must not end with one of them
        with contextlib.suppress(BaseException):
            await pool(broken)
    else:
        with anyio.fail_after(10), pytest.raises(wanted):
            await pool(broken)
    assert await pool(lambda: 5) == 5
    pool.close()


def test_what_ends_a_process_is_no_failure():
    async def ask():
        return [is_failure(e) for e in (KeyboardInterrupt(), SystemExit(), GeneratorExit())]

    assert anyio.run(ask) == [False, False, False]
