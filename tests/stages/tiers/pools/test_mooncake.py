"""mooncake: the contract against a real master and a real owner, and both of them failing."""

from __future__ import annotations

import sys

import anyio
import pools
import pytest
from pooled_cases import (
    check_a_piece_that_was_evicted,
    check_a_record_of_a_later_format,
    check_a_record_that_differs_between_two_layers,
    check_hostile_manifests,
    check_namespaces,
    check_replaced_between_two_layers,
    check_that_a_record_makes_it,
    check_two_writers_of_one_key,
    damaged,
)

from tierloom.stages.errors import ConfigError, Lost
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.stages.tiers.pools.manifest import Manifest
from tierloom.stages.tiers.pools.mooncake import Mooncake, MooncakeOptions
from tierloom.testing import NAMESPACE, Pool, TierBench, TierContract, key_of


def replaced(tier, name, value):
    """Put a value, or none, in the place of another."""
    tier._remove([name])
    if value:
        with tier._in_use() as client:
            assert client.put(tier._base + name, value) == 0


class TestMooncake(TierContract):
    ttl = bounded = False

    @pytest.fixture(autouse=True)
    def pool_of_memory(self, mooncake_pool):
        self.url = mooncake_pool.url
        self.used = []
        yield
        assert all(not tier._users and tier._client is None for tier in self.used)

    def make(self, ctx, folder, clock, **options):
        ctx = ctx._replace(namespace=ctx.namespace or NAMESPACE)
        self.used.append(Mooncake(MooncakeOptions(url=self.url, **options), ctx))
        return self.used[-1]

    @pytest.fixture
    async def tier(self, ctx, tmp_path, clock, anyio_backend):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await tier.clear()
            yield tier
            await tier.clear()

    def damage(self, tier, key, change):
        damaged(tier, key, change, replaced)

    @pytest.fixture
    def anyio_backend(self):
        return (
            "asyncio"  # the other one is tested with infinistore: closing a client takes a second
        )

    @pytest.mark.anyio
    async def test_namespaces_are_apart(self, ctx, tmp_path, clock, arena):
        await check_namespaces(self, ctx, tmp_path, clock, arena)

    @pytest.mark.anyio
    async def test_a_piece_that_was_evicted(self, tier, arena):
        await check_a_piece_that_was_evicted(self, tier, arena, replaced)

    @pytest.mark.anyio
    async def test_without_a_record_nothing_is_there(self, tier, arena):
        await check_that_a_record_makes_it(self, tier, arena)

    @pytest.mark.anyio
    async def test_two_writers_of_one_key(self, tier, arena):
        await check_two_writers_of_one_key(self, tier, arena)

    @pytest.mark.anyio
    async def test_hostile_records(self, tier):
        await check_hostile_manifests(self, tier, replaced)

    @pytest.mark.anyio
    async def test_replaced_between_two_layers(self, tier, arena):
        await check_replaced_between_two_layers(self, tier, arena)

    @pytest.mark.anyio
    async def test_a_record_that_differs_between_two_layers(self, tier):
        await check_a_record_that_differs_between_two_layers(self, tier, replaced)

    @pytest.mark.anyio
    async def test_a_record_of_a_later_format(self, tier):
        await check_a_record_of_a_later_format(self, tier, replaced)

    @pytest.mark.anyio
    async def test_pieces_end_where_frames_do(self, tier, arena):
        tier.piece = 12288
        assert await self.put(tier, 1) == [None]
        (raw,) = tier._peek([key_of(1).hex()])
        manifest = Manifest.unpack(raw)
        cut = manifest.names(key_of(1), tier.piece, 0, len(manifest.boundaries))
        assert [size for _, _, size in cut] == [4096] + [12288, 4096] * 3
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)


class TestSegment(TierBench):
    """No owner but the tier itself."""

    @pytest.fixture
    def anyio_backend(self):
        return "asyncio"

    @pytest.fixture(autouse=True)
    def pool_of_memory(self, tmp_path):
        pools.require("mooncake")
        empty = pools.MooncakePool(tmp_path, owners=0)
        self.url = empty.url
        yield
        empty.close()

    def make(self, ctx, folder, clock, **options):
        return Mooncake(MooncakeOptions(url=self.url, **options), ctx)

    @pytest.mark.anyio
    async def test_memory_that_a_tier_lends_is_used_by_all(self, ctx, tmp_path, clock, arena):
        async with self.opened(ctx, tmp_path, clock) as other:
            assert await self.put(other, 1) == [Lost.NO_ROOM]
            assert other.counts.refused == 1
            async with self.opened(ctx, tmp_path, clock, segment=64 << 20) as lender:
                assert await self.put(other, 1, 2) == [None, None]
                for tier in (lender, other):
                    assert await self.get(tier, 1) == self.bytes_of(arena, 1)
            assert await self.get(other, 1) is Lost.ABSENT, "it went with its lender"


class TestPins(TierBench):
    """In a pool so small that it evicts."""

    @pytest.fixture
    def anyio_backend(self):
        return "asyncio"

    @pytest.fixture(autouse=True)
    def pool_of_memory(self, tmp_path):
        pools.require("mooncake")
        small = pools.MooncakePool(tmp_path, segment=32 << 20, lease="200ms")
        self.url = small.url
        yield
        small.close()

    def make(self, ctx, folder, clock, **options):
        return Mooncake(MooncakeOptions(url=self.url, **options), ctx)

    @pytest.mark.anyio
    @pytest.mark.parametrize("pin", ["hard", "soft"])
    async def test_pinned_objects_outlive_the_others(self, ctx, tmp_path, clock, arena, pin):
        async with (
            self.opened(ctx, tmp_path, clock, pin=pin) as pinned,
            self.opened(ctx, tmp_path, clock) as tier,
        ):
            assert await self.put(pinned, 1, 2) == [None, None]
            lost = []
            for seed in range(10, 150):  # 110 MB through a pool of 32
                lost += await self.put(tier, seed, tokens=1024)
                if lost[-1] is Lost.NO_ROOM:
                    await anyio.sleep(0.2)  # until a lease is over
            assert lost.count(None) > 60
            kept = await tier.exists([key_of(seed, 1024) for seed in range(10, 150)])
            assert 0 < sum(kept) < 45
            for seed in (1, 2):
                assert await self.get(tier, seed) == self.bytes_of(arena, seed)
            await tier.clear()


@pytest.mark.parametrize(
    "options",
    [
        {"url": "mooncakestore://host"}, {"url": "http://host:1/"}, {"replicas": 0},
        {"url": "mooncakestore://host:1/x"}, {"threads": 0}, {"deadline": 0.0}, {"pin_ttl": 1.0},
    ],
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises(ValueError):
        MooncakeOptions(**({"url": "mooncakestore://host:1/"} | options))


@pytest.mark.anyio
async def test_no_client_library(monkeypatch):
    for name in ("mooncake", "mooncake.store"):
        monkeypatch.setitem(sys.modules, name, None)
    arena = Arena(1 << 20, huge_pages=False)
    options = MooncakeOptions(url="mooncakestore://127.0.0.1:1/")
    tier = Mooncake(options, TierContext(arena, NAMESPACE, Pool()))
    with pytest.raises(ConfigError, match=r"pip install 'tierloom\[mooncake\]'"):
        await tier.open()
    await tier.close()
    arena.close()


@pytest.fixture
def anyio_backend():
    return "asyncio"
