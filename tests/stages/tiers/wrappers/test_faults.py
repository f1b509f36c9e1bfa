"""Tiers that fail on purpose: memory tiers while they do not, and each fault as it is told."""

from __future__ import annotations

import anyio
import pytest

from tierloom.stages.catalog import TIERS, load_class
from tierloom.stages.errors import BadObject, Lost
from tierloom.stages.options import field_docs
from tierloom.stages.tiers.contract.tier import Read
from tierloom.stages.tiers.memory.tier import MemoryOptions
from tierloom.stages.tiers.wrappers.faults import (
    Flaky,
    FlakyOptions,
    Full,
    Slow,
    SlowOptions,
    Stuck,
    StuckOptions,
)
from tierloom.testing import ALL, FRAMES, SIZE, TierBench, TierContract, key_of, verify


class TestSlow(TierContract):
    local = True

    def make(self, ctx, folder, clock, *, capacity=32 * SIZE, **options):
        return Slow(
            SlowOptions(capacity=capacity, delay=0.0, bandwidth=1 << 40, **options),
            ctx,
            clock=clock,
        )


class TestFaults(TierBench):
    @pytest.mark.anyio
    async def test_flaky_raises(self, ctx):
        tier = Flaky(FlakyOptions(capacity=8 * SIZE, rate=0.5, seed=1), ctx)
        await tier.open()
        failed = 0
        for seed in range(40):
            try:
                await self.put(tier, seed)
            except OSError:  # noqa: PERF203
                failed += 1
        assert 10 < failed < 30
        await tier.close()

    @pytest.mark.anyio
    async def test_flaky_corrupts_copies_only(self, ctx, arena):
        tier = Flaky(FlakyOptions(capacity=8 * SIZE, rate=1.0, corrupt=True), ctx)
        await tier.open()
        await self.put(tier, 1)
        for _ in range(10):
            with pytest.raises(BadObject):
                await self.get(tier, 1)
        kept = tier._index.get(key_of(1)).place
        assert verify(kept, key_of(1)) == self.bytes_of(arena, 1)
        assert kept.loaded == FRAMES
        await tier.close()

    @pytest.mark.anyio
    @pytest.mark.parametrize("at", ["open", "has", "read", "put", "first_byte"])
    async def test_stuck_until_cancelled(self, ctx, arena, at):
        tier = Stuck(StuckOptions(capacity=8 * SIZE, at=at), ctx)
        calls = {
            "open": tier.open,
            "put": lambda: self.put(tier, 1),
            "has": lambda: tier.exists([key_of(1)]),
            "read": lambda: tier.read([Read(key_of(1), ALL)]),
        }
        calls["first_byte"] = calls["read"]
        for name in ("open", "put", "has"):
            if name != at:
                await calls[name]()
        with anyio.move_on_after(0.01) as scope:
            await calls[at]()
        assert scope.cancelled_caught
        await tier.close()
        assert arena.leases == 0

    @pytest.mark.anyio
    async def test_full(self, ctx):
        tier = Full(MemoryOptions(capacity=8 * SIZE), ctx)
        assert await self.put(tier, 1, 2) == [Lost.NO_ROOM] * 2
        assert tier.counts.refused == 2


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        (FlakyOptions, {"rate": 2.0}),
        (StuckOptions, {"at": "close"}),
        (SlowOptions, {"capacity": 0}),
        (FlakyOptions, {"evict": "best"}),
    ],
)
def test_bad_options(options, bad):
    with pytest.raises(ValueError):
        options(**({"capacity": 1} | bad))


@pytest.mark.parametrize("name", sorted(TIERS))
def test_every_option_has_its_line(name):
    import dataclasses
    import typing

    options = load_class("tier", name).Options
    fields = {field.name for field in dataclasses.fields(options)}
    assert set(field_docs(options)) == fields
    assert set(typing.get_type_hints(options)) >= fields
