"""CircuitBreaker: failures become data, a failing tier is left alone, reads are priced."""

from __future__ import annotations

import errno
import logging
import re
from types import SimpleNamespace

import anyio
import pytest

from tierloom.stages.errors import ConfigError, Lost, Refused, TierDown
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.read_cost import ReadCostModel
from tierloom.stages.tiers.contract.tier import Read
from tierloom.stages.tiers.memory.tier import Memory, MemoryOptions
from tierloom.stages.tiers.wrappers.faults import Stuck, StuckOptions
from tierloom.testing import ALL, SIZE, TierBench, TierContract, key_of


def limits(timeout=30.0, fails=3, probe=5.0):
    return SimpleNamespace(timeout=timeout, fails=fails, probe=probe)


class Broken(Memory):
    """Raises what it is told to."""

    error: Exception | None = None
    calls = 0

    async def open(self):
        self._fail()
        await super().open()

    async def read(self, reads):
        await super().read(reads)
        self._fail()

    async def exists(self, keys):
        self._fail()
        return await super().exists(keys)

    async def put(self, objects):
        self._fail()
        return await super().put(objects)

    async def delete(self, keys):
        self._fail()
        return await super().delete(keys)

    def _fail(self):
        self.calls += 1
        if self.error is not None:
            raise self.error


class TestGuarded(TierContract):
    """A guarded tier keeps every promise of the tier in it."""

    local = True

    def make(self, ctx, folder, clock, *, capacity=32 * SIZE, **options):
        tier = Memory(MemoryOptions(capacity=capacity, **options), ctx, clock=clock)
        return CircuitBreaker(tier, "hot", limits())

    @pytest.mark.skip(reason="a mistake of the caller, too, is caught here")
    async def test_unsealed_objects_are_a_mistake(self): ...


class TestBreaker(TierBench):
    def make(self, ctx, folder, clock, **options):
        tier = Broken(MemoryOptions(capacity=8 * SIZE), ctx)
        return CircuitBreaker(tier, "hot", limits(), clock=clock)

    @pytest.mark.anyio
    @pytest.mark.parametrize("error", [OSError("gone"), TierDown("gone"), TimeoutError("slow")])
    async def test_failures_are_data(self, tier, error):
        await self.put(tier, 1)
        code = Lost.LATE if isinstance(error, TimeoutError) else Lost.TIER_DOWN
        tier.tier.error = error
        assert await tier.exists([key_of(1)] * 2) == [False, False]
        assert tier.available
        assert await self.get(tier, 1) is code
        assert await self.get(tier, 1) is code
        assert not tier.available
        calls = tier.tier.calls
        assert await self.get(tier, 1) is Lost.TIER_DOWN
        assert await self.put(tier, 2, 3) == [Lost.TIER_DOWN] * 2
        assert tier.tier.calls == calls

    @pytest.mark.anyio
    async def test_puts_that_fail_take_no_reads_along(self, tier, clock):
        await self.put(tier, 1)
        tier.tier.error = OSError("gone")
        for _ in range(3):
            assert tier.takes
            assert await self.put(tier, 2, 3) == [Lost.TIER_DOWN] * 2
        assert not tier.takes
        assert tier.figures()["writes_down_since"] > 0
        calls = tier.tier.calls
        assert await self.put(tier, 2) == [Lost.TIER_DOWN]
        assert await tier.delete([key_of(1)]) == 0
        assert tier.tier.calls == calls
        tier.tier.error = None
        assert isinstance(await self.get(tier, 1), bytes)
        assert not tier.takes, "a read makes good no put"
        clock.now += 6
        assert await self.put(tier, 2) == [None]
        figures = tier.figures()
        assert tier.takes
        assert figures["writes_down_since"] == figures["reads_down_since"] == 0

    @pytest.mark.anyio
    async def test_puts_make_good_no_read(self, tier):
        """Who takes everything and gives nothing is left alone, in both directions."""
        await self.put(tier, 1)

        async def broken(_):
            raise OSError(5, "Input/output error")

        tier.tier.read = broken
        for i in range(3):
            assert await self.put(tier, 2 + i) == [None]
            assert await self.get(tier, 1) is Lost.TIER_DOWN
        assert not tier.available
        assert await self.put(tier, 6) == [Lost.TIER_DOWN]
        assert "Input/output error" in tier.figures()["last_error"]

    @pytest.mark.anyio
    async def test_puts_alone_find_out_that_reads_work_again(self, tier, clock):
        """Where nothing is asked for, as by an engine that only stores."""
        await self.put(tier, 1)
        plain = tier.tier.read

        async def broken(_):
            raise OSError(5, "Input/output error")

        tier.tier.read = broken
        for _ in range(3):
            await self.get(tier, 1)
        assert await self.put(tier, 2) == [Lost.TIER_DOWN]
        clock.now += 6
        assert await self.put(tier, 3) == [None], "a probe is due"
        assert not tier.available, "what was put could not be read back"
        assert await self.put(tier, 4) == [Lost.TIER_DOWN]
        tier.tier.read = plain
        clock.now += 6
        assert await self.put(tier, 5) == [None]
        assert tier.figures()["available"]
        assert await self.put(tier, 6) == [None]

    @pytest.mark.anyio
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), Lost.NO_ROOM),
            (OSError(errno.EDQUOT, "Disk quota exceeded"), Lost.NO_ROOM),
            (OSError(errno.EROFS, "Read-only file system"), Lost.REFUSED),
            (PermissionError(errno.EACCES, "Permission denied"), Lost.REFUSED),
            (Refused("READONLY You can't write against a read only replica"), Lost.REFUSED),
            (Refused("OOM command not allowed", Lost.NO_ROOM), Lost.NO_ROOM),
        ],
    )
    async def test_a_refused_put_is_no_failure(self, tier, clock, caplog, error, code):
        """It is tried again after a minute, or when something was deleted; one line says it."""
        await self.put(tier, 1)
        plain, asked = tier.tier.put, 0

        async def full(objects):
            nonlocal asked
            asked += 1
            raise error

        tier.tier.put = full
        for _ in range(5):
            assert await self.put(tier, 2) == [code]
        assert asked == 1
        assert not tier.takes
        (said,) = [r.message for r in caplog.records]
        assert said.startswith("tier hot takes nothing, and serves what it has: ")
        assert str(error) in said
        assert tier.available
        assert isinstance(await self.get(tier, 1), bytes)
        assert await tier.exists([key_of(1)]) == [True]
        clock.now += 61
        assert await self.put(tier, 2) == [code]
        assert asked == 2
        assert await tier.delete([key_of(1)]) == 1
        tier.tier.put = plain
        assert await self.put(tier, 2) == [None]
        assert tier.takes
        assert caplog.records[-1].message == "tier hot takes puts again after 61 s"

    @pytest.mark.anyio
    async def test_what_is_said_of_a_tier_that_is_down(self, tier, clock, caplog):
        """One line when it begins, one every five minutes, one at its end."""
        await self.put(tier, 1)
        tier.tier.error = OSError(5, "Input/output error")
        for _ in range(1300):
            await tier.exists([key_of(1)])
            clock.now += 0.5
        tier.tier.error = None
        clock.now += 6
        assert isinstance(await self.get(tier, 1), bytes)
        said = [r.message for r in caplog.records]
        down = "tier hot reads fail: [Errno 5] Input/output error"
        assert said[:-1] == [down] * 3
        assert re.fullmatch(r"tier hot reads work again after 65\d s", said[-1])

    @pytest.mark.anyio
    async def test_one_that_cannot_be_opened_is_named(self, ctx, clock, caplog):
        inner = Broken(MemoryOptions(capacity=8 * SIZE), ctx)
        inner.options = SimpleNamespace(url="redis://me:hunter2@host:6379/0")
        inner.error = OSError("connection refused")
        tier = CircuitBreaker(inner, "cold", limits(), clock=clock)
        await tier.open()
        (said,) = [r.message for r in caplog.records]
        assert said == "tier cold (redis://***@host:6379/0) is down: connection refused"
        inner.error = None
        clock.now += 7
        assert await tier.exists([key_of(1)]) == [False]
        assert [r.message for r in caplog.records][1:] == [
            "tier cold (redis://***@host:6379/0) is back after 7 s"
        ]
        assert tier.takes
        await tier.close()

    @pytest.mark.anyio
    async def test_a_success_starts_the_count_again(self, tier):
        await self.put(tier, 1)
        for _ in range(4):
            tier.tier.error = OSError()
            await tier.exists([key_of(1)])
            await tier.exists([key_of(1)])
            tier.tier.error = None
            assert await tier.exists([key_of(1)]) == [True]
        assert tier.available

    @pytest.mark.anyio
    @pytest.mark.parametrize("what", ["read"])
    async def test_who_answers_but_carries_nothing_is_left_alone(self, tier, clock, what):
        """As a pool's master does whose owner of memory is gone."""

        async def gone(_):
            raise TierDown("gone")

        async def carried():
            return await self.get(tier, 1) not in (Lost.TIER_DOWN, Lost.LATE)

        await self.put(tier, 1)
        plain = getattr(tier.tier, what)
        setattr(tier.tier, what, gone)
        for _ in range(3):
            assert await tier.exists([key_of(1)]) == [True]
            assert not await carried()
        assert not tier.available
        clock.now += 6
        assert await tier.exists([key_of(1)]) == [True]
        assert not await carried()
        assert not tier.available
        clock.now += 6
        setattr(tier.tier, what, plain)
        assert await tier.exists([key_of(1)]) == [True]
        assert await carried()
        assert await tier.exists([key_of(1)]) == [True]
        clock.now -= 6
        assert tier.available, "it is back"

    @pytest.mark.anyio
    async def test_one_probe_at_a_time(self, tier, clock):
        await self.put(tier, 1)
        tier.tier.error = OSError()
        for _ in range(3):
            await tier.exists([key_of(1)])
        clock.now += 4
        assert not tier.available
        clock.now += 2
        assert tier.available
        assert await tier.exists([key_of(1)]) == [False]  # the probe fails
        assert not tier.available
        clock.now += 6
        tier.tier.error = None
        gate, begun = anyio.Event(), anyio.Event()

        async def slow(keys, plain=tier.tier.exists):
            begun.set()
            await gate.wait()
            return await plain(keys)

        tier.tier.exists = slow
        answers = []

        async def ask():
            answers.append(await tier.exists([key_of(1)]))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await begun.wait()
            assert not tier.available  # while the probe is under way
            assert await self.get(tier, 1) is Lost.TIER_DOWN
            gate.set()
        assert answers == [[True]]
        assert tier.available
        assert isinstance(await self.get(tier, 1), bytes)

    @pytest.mark.anyio
    async def test_cancellation_passes_and_frees_the_probe(self, tier, clock):
        tier.tier.error = OSError()
        for _ in range(3):
            await tier.exists([key_of(1)])
        clock.now += 6
        tier.tier.error = None
        plain, tier.tier.exists = tier.tier.exists, lambda keys: anyio.sleep_forever()
        with anyio.move_on_after(0.01) as scope:
            await tier.exists([key_of(1)])
        assert scope.cancelled_caught
        assert tier.available
        tier.tier.exists = plain
        assert await tier.exists([key_of(1)]) == [False]

    @pytest.mark.anyio
    @pytest.mark.parametrize(("waited", "open"), [(8.0, True), (1.0, False)])
    async def test_calls_given_up_late_count_as_failed(self, tier, clock, waited, open):
        """A request's deadline is sooner than the limit of a call; three in vain are enough."""

        async def hangs(keys):
            clock.now += waited  # of a limit of 30 seconds
            await anyio.sleep_forever()

        plain, tier.tier.exists = tier.tier.exists, hangs
        for _ in range(3):
            assert tier.available
            with anyio.move_on_after(0.01):
                await tier.exists([key_of(1)])
        assert tier.available != open
        tier.tier.exists = plain
        clock.now += 6
        assert await tier.exists([key_of(1)]) == [False]
        assert tier.available

    @pytest.mark.anyio
    async def test_mistakes_are_logged_once(self, tier, caplog):
        tier.tier.error = KeyError("a bug")
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                assert await self.put(tier, 1) == [Lost.TIER_DOWN]
        (record,) = caplog.records
        assert record.message.startswith("tier hot raised an unexpected error\nTraceback")
        assert not tier.takes

    @pytest.mark.anyio
    @pytest.mark.parametrize("kind", [OSError, KeyError, TierDown])
    async def test_no_secret_is_logged(self, tier, caplog, kind):
        tier.tier.error = kind("cannot reach redis://user:hunter2@host:6379, password=hunter2")
        with caplog.at_level(logging.DEBUG):
            for _ in range(3):
                await tier.exists([key_of(1)])
        told = " ".join(str(vars(r)) + caplog.handler.format(r) for r in caplog.records)
        assert "redis://***@host:6379" in told
        assert "hunter2" not in told

    @pytest.mark.anyio
    async def test_no_secret_is_in_what_opening_says(self, ctx, clock):
        inner = Broken(MemoryOptions(capacity=SIZE), ctx)
        inner.error = ConfigError("redis://user:hunter2@host: no such database")
        with pytest.raises(ConfigError, match=r"^redis://\*\*\*@host: no such database$") as caught:
            await CircuitBreaker(inner, "cold", limits()).open()
        assert caught.value.__suppress_context__

    @pytest.mark.anyio
    async def test_a_failed_read_leaves_no_leases(self, tier, arena):
        await self.put(tier, 1)
        first = Read(key_of(1), 1)
        await tier.read([first])
        tier.tier.error = OSError()  # raised after the objects were handed out
        reads = [Read(key_of(1), ALL), Read(key_of(1), ALL, first.object)]
        await tier.read(reads)
        assert [read.lost for read in reads] == [Lost.TIER_DOWN] * 2
        assert reads[0].object is None
        assert reads[1].object is first.object  # what the reader had stays the reader's
        first.object.lease.release()
        assert arena.flight == 0

    @pytest.mark.anyio
    @pytest.mark.parametrize("at", ["has", "read", "put", "first_byte"])
    async def test_a_hanging_call_is_late(self, ctx, arena, at):
        stuck = Stuck(StuckOptions(capacity=8 * SIZE, at=at), ctx)
        tier = CircuitBreaker(stuck, "stuck", limits(timeout=0.02, fails=2))
        await tier.open()
        if at == "put":
            assert await self.put(tier, 1) == [Lost.LATE]
        else:
            await self.put(tier, 1)
        if at == "has":
            assert await tier.exists([key_of(1)]) == [False]
        elif at != "put":
            assert await self.get(tier, 1) is Lost.LATE
            assert arena.flight == 0
        await tier.close()
        assert arena.leases == 0

    @pytest.mark.anyio
    async def test_a_tier_that_is_down_at_first(self, ctx, clock):
        inner = Broken(MemoryOptions(capacity=8 * SIZE), ctx)
        tier = CircuitBreaker(inner, "cold", limits(), clock=clock)
        inner.error = OSError("connection refused")
        await tier.open()
        assert not tier.available
        clock.now += 6
        inner.error = None
        assert await self.put(tier, 1) == [None]  # opens it first
        assert ctx.arena.reclaim
        await tier.close()

    @pytest.mark.anyio
    async def test_a_wrong_configuration_is_told(self, ctx):
        inner = Broken(MemoryOptions(capacity=8 * SIZE), ctx)
        inner.error = ConfigError("no such folder")
        with pytest.raises(ConfigError):
            await CircuitBreaker(inner, "cold", limits()).open()

    @pytest.mark.anyio
    async def test_what_a_hanging_open_costs(self, ctx):
        tier = CircuitBreaker(
            Stuck(StuckOptions(capacity=8 * SIZE, at="open"), ctx), "cold", limits(timeout=0.002)
        )
        await tier.open()
        assert not tier.available

    @pytest.mark.anyio
    async def test_reads_are_priced(self, tier, clock):
        assert tier.cost(SIZE) is None
        await self.put(tier, 1)
        read = tier.tier.read

        async def timed(reads):
            await read(reads)
            clock.now += 0.5

        tier.tier.read = timed
        await self.get(tier, 1)
        plain = SIZE - PAGE  # of KV; the header is read besides
        assert tier.cost(plain) == pytest.approx(0.5, rel=1e-3)
        assert tier.cost(2 * plain) == pytest.approx(1.0, rel=1e-3)
        assert tier.reads.bandwidth == pytest.approx(2 * SIZE)
        clock.now += 61
        assert tier.cost(plain) is None, "that was long ago: try it again"


def test_cost_tells_latency_from_bandwidth():
    cost = ReadCostModel()
    assert cost.of(1) is None
    assert cost.latency == cost.bandwidth == 0.0
    for i in range(60):
        nbytes = (1 + i % 4) << 20
        cost.add(nbytes, 0.002 + nbytes / 1e9)
    assert cost.latency == pytest.approx(0.002, rel=0.05)
    assert cost.bandwidth == pytest.approx(1e9, rel=0.05)
    assert cost.of(8 << 20) == pytest.approx(0.002 + (8 << 20) / 1e9, rel=0.05)
    for _ in range(100):
        cost.add(1 << 20, 0.1)  # it became slow
    assert cost.of(1 << 20) == pytest.approx(0.1, rel=0.05)


def test_cost_is_never_negative():
    cost = ReadCostModel()
    cost.add(1 << 20, 1.0)
    cost.add(8 << 20, 0.1)  # a cold start, then quick: a falling line
    assert cost.of(1) >= 0
    assert cost.of(1 << 30) > 0
