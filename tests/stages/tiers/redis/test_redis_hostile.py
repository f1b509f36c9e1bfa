"""redis that hangs and lies: no late byte lands anywhere, and every call ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tracemalloc

import anyio
import pytest
from servers import redis

from tierloom.stages.errors import Lost, TierDown
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import Read
from tierloom.testing import ALL, SIZE, key_of, make_object

from .standins import Liar, Valve
from .test_redis import RedisBench, server, url_of  # noqa: F401 (a fixture)
from .test_redis_faults import limits


class TestHanging(RedisBench):
    @pytest.mark.anyio
    async def test_late_bytes_land_nowhere(self, ctx, tmp_path, clock, arena):
        """A read is cancelled in the middle of a piece; its memory is leased anew; then the rest
        of the piece comes."""
        async with Valve(self.server.port) as valve:
            url = f"redis://127.0.0.1:{valve.port}"
            async with self.opened(ctx, tmp_path, clock, url=url) as tier:
                await self.put(tier, 1, 2)
                valve.left, before = 20_000, valve.connections
                async with anyio.create_task_group() as group:
                    group.start_soon(self.get, tier, 1)
                    await valve.shut.wait()
                    await anyio.sleep(0.1)  # for what was let through to come
                    group.cancel_scope.cancel()
                assert arena.flight == 0
                taken = arena.lease(arena.working)  # all there is, so what the read had is in it
                taken.view[:] = b"\xee" * arena.working
                valve.left = 1 << 60
                valve.opened.set()
                await anyio.sleep(0.2)
                assert taken.view == b"\xee" * arena.working
                taken.release()
                for seed in (2, 1):
                    assert await self.get(tier, seed) == self.bytes_of(arena, seed)
                assert valve.connections > before, "no connection with unread bytes is used again"

    @pytest.mark.anyio
    @pytest.mark.parametrize("call", ["has", "read", "put", "drop", "clear"])
    async def test_a_server_that_hangs(self, ctx, tmp_path, clock, arena, call):
        inner = self.make(ctx, tmp_path, clock)
        tier = CircuitBreaker(inner, "cold", limits())
        await tier.open()
        await self.put(tier, 1)
        self.server.pause()
        try:
            for _ in range(2):
                assert tier.available
                assert tier.takes
                with anyio.fail_after(5):
                    if call == "has":
                        assert await tier.exists([key_of(1)]) == [False]
                    elif call == "read":
                        assert await self.get(tier, 1) is Lost.LATE
                    elif call == "put":
                        assert await self.put(tier, 2) == [Lost.LATE]
                    else:
                        await (tier.delete([key_of(1)]) if call == "drop" else tier.clear())
            assert tier.available == (call in ("put", "drop", "clear"))
            assert not tier.takes
            assert arena.leases == 0
        finally:
            self.server.resume()
        await self.lands(tier, 3)
        assert await self.get(tier, 3) == self.bytes_of(arena, 3)
        await tier.close()

    @pytest.mark.anyio
    async def test_nothing_moves(self, ctx, tmp_path, clock):
        """Without any other limit, too."""
        async with self.opened(ctx, tmp_path, clock, stall=0.2) as tier:
            await self.put(tier, 1)
            self.server.pause()
            try:
                with anyio.fail_after(5), pytest.raises(TierDown, match="no traffic for"):
                    await self.get(tier, 1)
                with anyio.fail_after(5), pytest.raises(TierDown):
                    await self.put(tier, 2)
            finally:
                self.server.resume()
            assert isinstance(await self.get(tier, 1), bytes)

    @pytest.mark.anyio
    async def test_a_host_that_takes_no_connection(self, ctx, tmp_path, clock):
        with redis() as mute:
            mute.pause()
            tier = self.make(ctx, tmp_path, clock, url=url_of(mute), stall=0.2)
            with anyio.fail_after(5), pytest.raises(TierDown):
                await tier.open()
            await tier.close()

    @pytest.mark.anyio
    async def test_killed_and_back(self, ctx, tmp_path, clock, arena):
        with redis() as mortal:
            inner = self.make(ctx, tmp_path, clock, url=url_of(mortal))
            tier = CircuitBreaker(inner, "cold", limits())
            await tier.open()
            assert await self.put(tier, 1) == [None]
            mortal.kill()
            for _ in range(2):
                assert await self.get(tier, 1) in (Lost.TIER_DOWN, Lost.LATE)
                assert await self.put(tier, 2) != [None]
            assert not tier.available
            mortal.start()
            await self.lands(tier, 3)
            assert await self.get(tier, 1) is Lost.ABSENT
            assert await self.get(tier, 3) == self.bytes_of(arena, 3)
            await tier.close()

    @pytest.mark.anyio
    async def test_not_there_at_first(self, ctx, tmp_path, clock):
        with redis() as late:
            late.kill()
            tier = CircuitBreaker(
                self.make(ctx, tmp_path, clock, url=url_of(late)), "cold", limits()
            )
            await tier.open()
            assert not tier.available
            late.start()
            await self.lands(tier, 1)
            await tier.close()

    @pytest.mark.anyio
    async def test_a_cancelled_call_hurts_no_other(self, ctx, tmp_path, clock, arena):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, *range(20))
            right = {seed: self.bytes_of(arena, seed) for seed in range(20)}

            async def impatient(number):
                for _ in range(30):
                    with anyio.move_on_after(0.0003 * number):
                        await self.get(tier, number)

            async def patient(number):
                for _ in range(30):
                    assert await self.get(tier, number) == right[number]

            async with anyio.create_task_group() as group:
                for number in range(5):
                    group.start_soon(impatient, number)
                    group.start_soon(patient, number + 10)
            assert arena.flight == 0


GET = b"GET"
LIES = {
    "a huge piece": lambda w: b"$99999999999\r\n" if w[0] == GET else b":1\r\n",
    "no RESP": lambda w: b"HTTP/1.1 200 OK\r\n\r\n",
    "nested arrays": lambda w: b"*1\r\n" * 100,
    "a number for a string": lambda w: b":7\r\n",
    "a push": lambda w: b">2\r\n+a\r\n+b\r\n",
    "more than was asked": lambda w: b":1\r\n:1\r\n:1\r\n",
    "it hangs up": lambda w: None,
    "an endless line": lambda w: b"+" + b"a" * 100_000,
    "not now": lambda w: b"-LOADING soon\r\n",
    "no such command": lambda w: b"-ERR unknown command\r\n",
}


class TestLying(RedisBench):
    @pytest.mark.anyio
    @pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
    async def test_lies(self, ctx, tmp_path, clock, arena, lie, caplog):
        """Every call ends with an error that has a name, in bounded memory."""

        def answer(words):
            return b"+PONG\r\n" if words[0] == b"PING" else lie(words)

        async with Liar(answer) as liar:
            url = f"redis://127.0.0.1:{liar.port}"
            async with self.opened(ctx, tmp_path, clock, url=url) as tier:
                obj = make_object(arena, 1)
                calls = {
                    "read": lambda: tier.read([Read(key_of(1), ALL)]),
                    "put": lambda: tier.put([obj]),
                    "drop": lambda: tier.delete([key_of(1)]),
                    "clear": tier.clear,
                }
                tracemalloc.start()
                for call in calls.values():
                    with anyio.fail_after(5), contextlib.suppress(TierDown, OSError):
                        await call()
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                assert peak < 8 << 20
                obj.lease.release()
                assert arena.flight == 0
        assert not [r for r in caplog.records if r.levelno >= logging.ERROR]

    @pytest.mark.anyio
    async def test_a_huge_piece_closes_the_connection(self, ctx, tmp_path, clock, arena):
        obj = make_object(arena, 1)
        manifest = b"TLR1" + (1 << 20).to_bytes(4, "little") + SIZE.to_bytes(8, "little")
        manifest += b"w" * 8 + bytes(obj.lease.view[:4096])
        obj.lease.release()

        def answer(words):
            if not words[0].startswith(GET):
                return {b"PING": b"+PONG\r\n", b"PTTL": b":90000000\r\n"}.get(words[0], b":1\r\n")
            if words[1].endswith(b"}"):
                return b"$%d\r\n%b\r\n" % (len(manifest), manifest)
            return b"$536870912\r\n" + b"x" * 100_000

        async with Liar(answer) as liar:
            url = f"redis://127.0.0.1:{liar.port}"
            async with self.opened(ctx, tmp_path, clock, url=url) as tier:
                read = Read(key_of(1), ALL)
                await tier.read([read])
                assert (read.object, read.lost) == (None, Lost.CORRUPT)
                assert tier.counts.corrupt == 1
                await asyncio.wait_for(liar.closed.wait(), 5)
        assert arena.flight == 0
