"""mooncake whose owner or master dies, freezes, comes back; and a client that is slow to let go."""

from __future__ import annotations

import time

import anyio
import pools
import pytest
from pooled_cases import give_up_a_read

from tierloom.pipeline.config.spec import Breaker
from tierloom.stages.errors import Lost, TierDown
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import Read
from tierloom.stages.tiers.pools import mooncake
from tierloom.stages.tiers.pools.mooncake import Mooncake, MooncakeOptions
from tierloom.testing import ALL, TierBench, key_of

QUICK = {"deadline": 1.0}


@pytest.fixture
def memory(tmp_path):
    """A pool of one owner, for this test alone."""
    pools.require("mooncake")
    made = pools.MooncakePool(tmp_path)
    yield made
    made.close()


async def eventually(what, seconds=20.0):
    """Wait until `await what()` is true."""
    end = time.monotonic() + seconds
    while not await what():
        assert time.monotonic() < end, "it never came true"
        await anyio.sleep(0.1)


class TestFaults(TierBench):
    @pytest.fixture
    def anyio_backend(self):
        return "asyncio"

    @pytest.fixture(autouse=True)
    def pool_of_memory(self, memory):
        self.memory = memory

    def make(self, ctx, folder, clock, **options):
        return Mooncake(MooncakeOptions(url=self.memory.url, **(QUICK | options)), ctx)

    async def guarded(self, tier, **limits):
        made = CircuitBreaker(tier, "cold", Breaker(**({"timeout": 0.5, "probe": 0.2} | limits)))
        await made.open()
        return made

    def freeze_under_a_fetch(self, tier, monkeypatch):
        """Let the owner freeze when the next read has found its manifest."""
        fetch = tier._fetch

        def freezing(pieces):
            self.memory.owners[0].pause()
            return fetch(pieces)

        monkeypatch.setattr(tier, "_fetch", freezing)

    @pytest.mark.anyio
    async def test_a_read_that_was_given_up_writes_into_no_other_lease(
        self, tier, arena, monkeypatch
    ):
        """Its owner is frozen under a read, whose caller goes; all the rest of the arena is leased
        to others; the owner wakes up and sends. What others hold is as they left it."""
        await self.put(tier, 1)
        through = await give_up_a_read(tier, monkeypatch, self.memory.owners[0].pause)
        assert arena.leases == 1, "the lease goes home only when the thread is through"
        assert tier.counts.extra["abandoned"] == 1
        others = []
        while arena.flight + 4096 <= arena.working:
            others.append(arena.lease(4096))
            others[-1].view[:] = b"\xa5" * 4096
        self.memory.owners[0].resume()
        through.set()
        assert await tier._calls.idle(10)
        await anyio.sleep(1)
        assert all(bytes(lease.view) == b"\xa5" * 4096 for lease in others)
        for lease in others:
            lease.release()
        assert arena.leases == 0
        await eventually(lambda: self.comes(tier, 1))

    async def comes(self, tier, seed):
        try:
            return await self.get(tier, seed) == self.bytes_of(tier.ctx.arena, seed)
        except (TierDown, OSError):
            return False

    async def stores(self, guarded, seed):
        return await self.put(guarded, seed) == [None]

    @pytest.mark.anyio
    async def test_a_transfer_in_doubt_keeps_its_lease_until_the_client_is_closed(
        self, tier, arena, monkeypatch
    ):
        """As after a transfer that the client gave up while it was still going on."""
        monkeypatch.setattr(mooncake, "_SURE", 0.0)
        closing = []
        disconnect = tier._disconnect
        monkeypatch.setattr(tier, "_disconnect", lambda: closing.append(arena.leases))
        await self.put(tier, 1)
        first = tier._client
        with monkeypatch.context() as patch:
            self.freeze_under_a_fetch(tier, patch)
            with pytest.raises(TierDown, match="no piece"):
                await tier.read([Read(key_of(1), ALL)])
        self.memory.owners[0].resume()
        assert arena.leases == 1
        with pytest.raises(TierDown, match="is closed"):
            await tier.exists([key_of(1)])
        await anyio.to_thread.run_sync(disconnect)
        assert arena.leases == 0
        await eventually(lambda: self.comes(tier, 1))
        assert tier._client is not first
        monkeypatch.setattr(tier, "_disconnect", disconnect)

    @pytest.mark.anyio
    async def test_a_frozen_owner_is_no_miss(self, tier):
        """The client's answer is the same as for what is not there."""
        await self.put(tier, 1)
        self.memory.owners[0].pause()
        with pytest.raises(TierDown, match="owns"):
            await tier.read([Read(key_of(1), ALL)])
        self.memory.owners[0].resume()
        await eventually(lambda: self.comes(tier, 1))

    @pytest.mark.anyio
    async def test_the_owner_dies(self, tier, arena):
        guarded = await self.guarded(tier)
        await self.put(tier, 1, 2)
        self.memory.owners[0].kill()
        for _ in range(4):
            read = Read(key_of(1), ALL)
            await guarded.read([read])
            assert read.object is None
            assert read.lost in (Lost.TIER_DOWN, Lost.LATE, Lost.ABSENT)
        self.memory.add_owner()
        await eventually(lambda: self.stores(guarded, 3))
        assert await self.comes(tier, 3)

    @pytest.mark.anyio
    async def test_the_master_dies_and_comes_back(self, tier, arena):
        """It forgets all it knew. The client connects again by itself."""
        guarded = await self.guarded(tier)
        await self.put(tier, 1)
        self.memory.master.kill()
        for _ in range(6):
            assert await guarded.exists([key_of(1)]) == [False]
        assert not guarded.available
        self.memory.master.start()
        await eventually(lambda: self.stores(guarded, 2))
        assert await self.comes(tier, 2)

    @pytest.mark.anyio
    async def test_a_frozen_master_takes_no_more_threads_than_it_may(self, tier):
        guarded = await self.guarded(tier, fails=100)
        self.memory.master.pause()
        for _ in range(6):
            begun = time.monotonic()
            assert await guarded.exists([key_of(1)]) == [False]
            assert time.monotonic() - begun < 5  # 0.5 s, on a machine with time
            assert len(tier._calls._running) <= tier.options.threads
        assert tier.counts.extra["abandoned"] >= 2
        self.memory.master.resume()
        await eventually(lambda: self.stores(guarded, 1))
        assert await self.comes(tier, 1)

    @pytest.mark.anyio
    async def test_nobody_is_there_at_first(self, ctx, tmp_path, clock, arena):
        self.memory.master.kill()
        tier = self.make(ctx, tmp_path, clock)
        guarded = await self.guarded(tier)
        assert not guarded.available
        self.memory.master.start()
        await eventually(lambda: self.stores(guarded, 1))
        assert await self.comes(tier, 1)
        await guarded.close()

    @pytest.mark.anyio
    async def test_copies_outlive_an_owner(self, ctx, tmp_path, clock):
        self.memory.add_owner()
        async with self.opened(ctx, tmp_path, clock, replicas=2) as tier:
            assert await self.put(tier, 1, 2, 3) == [None] * 3
            copies = tier._client.get_replica_desc(tier._base + key_of(1).hex())
            assert len(copies) == 2
            self.memory.owners[0].kill()
            for seed in (1, 2, 3):
                await eventually(lambda seed=seed: self.comes(tier, seed))
