"""infinistore: the contract against a real server, which is asked over TCP."""

from __future__ import annotations

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

from tierloom.stages.tiers.pools.infinistore import Infinistore, InfinistoreOptions
from tierloom.testing import TierContract

pytestmark = pytest.mark.infinistore


def replaced(tier, name, value):
    """Put a value, or none, in the place of another."""
    with tier._link() as (link, base):
        link.remove(base + name)
        if value:
            assert link.put(base + name, value)


class TestInfinistore(TierContract):
    ttl = bounded = False

    @pytest.fixture(autouse=True)
    def server(self, infini_server):
        self.url = infini_server.url

    def make(self, ctx, folder, clock, **options):
        return Infinistore(InfinistoreOptions(url=self.url, **options), ctx)

    @pytest.fixture
    async def tier(self, ctx, tmp_path, clock, anyio_backend):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await tier.clear()
            yield tier
            await tier.clear()

    def damage(self, tier, key, change):
        damaged(tier, key, change, replaced)

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
