"""infinistore whose server freezes, dies, comes back or lies; and readers who go in the middle."""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress

import anyio
import pools
import pytest
from pooled_cases import give_up_a_read

from tierloom.pipeline.config.spec import Breaker
from tierloom.stages.errors import Lost, TierDown
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import Read
from tierloom.stages.tiers.pools.infinistore import Infinistore, InfinistoreOptions
from tierloom.testing import ALL, TierBench, key_of

pytestmark = pytest.mark.infinistore


class Bench(TierBench):
    url: str

    @pytest.fixture
    def anyio_backend(self):
        return "asyncio"

    def make(self, ctx, folder, clock, **options):
        options = {"deadline": 1.0, "url": self.url} | options
        return Infinistore(InfinistoreOptions(**options), ctx)

    async def guarded(self, tier, **limits):
        made = CircuitBreaker(tier, "cold", Breaker(**({"timeout": 0.5, "probe": 0.2} | limits)))
        await made.open()
        return made

    async def eventually_stores(self, guarded, seed):
        end = time.monotonic() + 20
        while await self.put(guarded, seed) != [None]:
            assert time.monotonic() < end
            await anyio.sleep(0.1)


class TestFaults(Bench):
    @pytest.fixture(autouse=True)
    def server_of_its_own(self, tmp_path):
        pools.require("infinistore")
        self.server = pools.InfiniServer(tmp_path)
        self.url = self.server.url
        yield
        self.server.kill()

    @pytest.mark.anyio
    async def test_a_frozen_server_takes_no_more_threads_than_it_may(self, tier, arena):
        guarded = await self.guarded(tier, fails=100)
        await self.put(tier, 1)
        self.server.pause()
        for _ in range(6):
            read = Read(key_of(1), ALL)
            await guarded.read([read])
            assert read.lost in (Lost.LATE, Lost.TIER_DOWN)
            assert len(tier._calls._running) <= tier.options.threads
        assert tier.counts.extra["abandoned"] >= 2
        assert await tier._calls.idle(5), "each ends by its deadline"
        self.server.resume()
        await self.eventually_stores(guarded, 2)
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)

    @pytest.mark.anyio
    async def test_a_read_that_was_given_up_writes_into_no_other_lease(
        self, tier, arena, monkeypatch
    ):
        await self.put(tier, 1)
        through = await give_up_a_read(tier, monkeypatch, self.server.pause)
        assert arena.leases == 1, "the lease goes home only when the thread is through"
        others = []
        while arena.flight + 4096 <= arena.working:
            others.append(arena.lease(4096))
            others[-1].view[:] = b"\xa5" * 4096
        self.server.resume()
        through.set()
        assert await tier._calls.idle(5)
        assert all(bytes(lease.view) == b"\xa5" * 4096 for lease in others)
        for lease in others:
            lease.release()
        assert arena.leases == 0

    @pytest.mark.anyio
    async def test_the_server_dies_and_comes_back(self, tier, arena):
        """It forgets all it knew, its clients' connections too."""
        guarded = await self.guarded(tier)
        await self.put(tier, 1)
        self.server.kill()
        for _ in range(4):
            assert await guarded.exists([key_of(1)]) == [False]
        assert not guarded.available
        self.server.start()
        await self.eventually_stores(guarded, 2)
        assert await self.get(tier, 2) == self.bytes_of(arena, 2)
        assert await self.get(tier, 1) is Lost.ABSENT

    @pytest.mark.anyio
    async def test_the_server_survives_readers_who_go_in_the_middle(self, tier):
        assert await self.put(tier, 1, 2, tokens=1024) == [None, None]
        for n in range(40):
            with anyio.move_on_after(0.0002 * n):
                reads = [Read(key_of(seed, 1024), ALL) for seed in (1, 2)]
                try:
                    await tier.read(reads)
                finally:
                    for read in reads:
                        if read.object is not None:
                            read.object.lease.release()
        assert await tier._calls.idle(5)
        assert self.server.child.poll() is None
        assert isinstance(await self.get(tier, 1, 1024), bytes)

    @pytest.mark.anyio
    async def test_other_peoples_values_stay(self, tier, ctx):
        with tier._link() as (link, _):
            assert link.put("somebody's", b"value")
        await self.put(tier, 1)
        assert await tier.clear() == 1
        with tier._link() as (link, _):
            assert link.read("somebody's", 100) == b"value"

    @pytest.mark.anyio
    async def test_a_name_that_was_evicted_is_made_again(self, tier, arena):
        await self.put(tier, 1)
        with tier._link() as (link, _):
            assert link.remove(tier._root)
        assert await tier.exists([key_of(1)]) == [False]
        assert await self.put(tier, 1) == [None]
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)


ANSWERS = {
    "hangs": None,
    "hangs up": b"",
    "is somebody else": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "has no such code": struct.pack("<ii", 999, 0),
    "a negative length": struct.pack("<ii", 200, -1),
    "a huge length": struct.pack("<ii", 200, 0x7FFFFFFF),
    "less than it says": struct.pack("<ii", 200, 16) + b"short",
}


class TestLies(Bench):
    """A server that answers whatever it is asked with the same bytes, and is quiet then."""

    @pytest.mark.anyio
    @pytest.mark.parametrize("answer", list(ANSWERS))
    async def test_an_answer_that_is_none(self, ctx, tmp_path, clock, answer):
        said = ANSWERS[answer]
        with socket.create_server(("127.0.0.1", 0)) as door:
            self.url = f"infinistore://127.0.0.1:{door.getsockname()[1]}"
            lines: list[socket.socket] = []
            threading.Thread(target=_serve, args=(door, said, lines), daemon=True).start()
            tier = self.make(ctx, tmp_path, clock, deadline=0.3)
            for _ in range(3):
                with pytest.raises((TierDown, OSError)):
                    await tier.read([Read(key_of(1), ALL)])
            assert await tier._calls.idle(2)
            await tier.close()
            for line in lines:
                line.close()


def _serve(door: socket.socket, said: bytes | None, lines: list[socket.socket]) -> None:
    with suppress(OSError):
        while True:
            line, _ = door.accept()
            lines.append(line)
            line.recv(1)
            if said is not None:
                line.sendall(said)
            if said == b"":
                line.close()


@pytest.mark.parametrize(
    "options",
    [
        {"url": "infinistore://host"}, {"url": "redis://host:1"}, {"threads": 0},
        {"deadline": 0.0}, {"piece": 5000}, {"piece": 0},
    ],
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises(ValueError):
        InfinistoreOptions(**({"url": "infinistore://host:1"} | options))
