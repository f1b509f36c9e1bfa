"""Tiers of third parties, which define methods by their old names, work for one release more."""

from __future__ import annotations

import pytest

from tierloom.stages.tiers.contract.key_value import Blobs
from tierloom.stages.tiers.contract.tier import Read
from tierloom.stages.tiers.memory.tier import Memory, MemoryOptions
from tierloom.testing import ALL, TierContract, key_of


def old_memory():
    class OldMemory(Memory):
        async def has(self, keys):
            self.asked = list(keys)
            return await super().has(keys)

        async def drop(self, keys):
            return await super().drop(keys)

        def settle(self, keys):
            super().settle(keys)

    return OldMemory


def old_shelf():
    class OldShelf(Blobs):
        async def open(self):
            self.kept = {}

        async def size(self, name):
            return len(self.kept.get(name, b""))

        async def fetch(self, name):
            return self.kept.get(name)

        async def store(self, name, data):
            self.kept[name] = data
            return True

        async def remove(self, name):
            self.kept.pop(name, None)

        async def names(self, prefix):
            return [name for name in self.kept if name.startswith(prefix)]

    return OldShelf


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (old_memory, {"has": "exists", "drop": "delete", "settle": "order_for_eviction"}),
        (old_shelf, {"fetch": "get_value", "store": "put_value", "remove": "delete_value"}),
    ],
)
def test_the_old_names_warn_where_they_are_defined(make, names):
    with pytest.warns(DeprecationWarning, match="is now called") as told:
        make()
    said = [str(warning.message) for warning in told]
    for old, new in names.items():
        assert any(f".{old} is now called {new}" in text for text in said)
    assert {warning.filename for warning in told} == {__file__}


class TestOldMemory(TierContract):
    local = True

    def make(self, ctx, folder, clock, **options):
        with pytest.warns(DeprecationWarning, match="is now called"):
            cls = old_memory()
        return cls(MemoryOptions(**({"capacity": 1 << 20} | options)), ctx, clock=clock)

    @pytest.mark.anyio
    async def test_the_new_name_leads_to_the_old_method(self, tier):
        await self.put(tier, 1)
        assert await tier.exists([key_of(1)]) == [True]
        assert tier.asked == [key_of(1)]
        tier.order_for_eviction([key_of(1)])
        assert await tier.has([key_of(1)]) == [True]
        assert await tier.delete([key_of(1)]) == 1


class TestOldShelf(TierContract):
    ttl = bounded = False

    def make(self, ctx, folder, clock, **options):
        with pytest.warns(DeprecationWarning, match="is now called"):
            cls = old_shelf()
        return cls(cls.Options(url="old://"), ctx)

    @pytest.mark.anyio
    async def test_a_read_of_nothing(self, tier):
        read = Read(key_of(1), ALL)
        await tier.read([read])
        assert read.object is None
