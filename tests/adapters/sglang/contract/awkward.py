"""A store of the tests that is late, stuck, down, lies or forgets, as the test says."""

from __future__ import annotations

import random
from typing import Any

import anyio

from tierloom.stages.tiers.wrappers.mock import Mock, MockOptions


class Mood:
    """How it behaves just now; each is a chance between 0 and 1."""

    damage = late = stuck = down = lost = 0.0
    delay = 0.05
    random = random.Random(5)

    @classmethod
    def well(cls) -> None:
        cls.damage = cls.late = cls.stuck = cls.down = cls.lost = 0.0
        cls.delay = 0.05

    @classmethod
    def is_(cls, chance: float) -> bool:
        return cls.random.random() < chance


KEPT: dict[str, bytearray] = {}
"""What is stored: it outlives the backend, as a remote store does."""


class Awkward(Mock):
    """Late and stuck calls go on until they are canceled."""

    def __init__(self, options: MockOptions, ctx: Any) -> None:
        super().__init__(options, ctx)
        self._kept = KEPT

    async def size(self, name: str) -> int:
        await self._act()
        return await super().size(name)

    async def get_value(self, name: str) -> bytearray | None:
        await self._act()
        if Mood.is_(Mood.lost):
            return None
        data = await super().get_value(name)
        if data is not None and Mood.is_(Mood.damage):
            data = bytearray(data)
            how = Mood.random.randrange(3)
            if how == 0:
                data[Mood.random.randrange(len(data))] ^= 1 << Mood.random.randrange(8)
            elif how == 1:
                del data[Mood.random.randrange(len(data)) :]
            else:
                other = Mood.random.choice(list(KEPT.values()))
                if len(other) == len(data):
                    data = bytearray(other)
        return data

    async def put_value(self, name: str, data: bytearray) -> bool:
        await self._act()
        return await super().put_value(name, data)

    async def _act(self) -> None:
        if Mood.is_(Mood.stuck):
            await anyio.sleep(3600)
        if Mood.is_(Mood.down):
            raise OSError("the store is down")
        if Mood.is_(Mood.late):
            await anyio.sleep(Mood.delay)


def over(capacity: str = "16 MiB", **more: Any) -> dict[str, Any]:
    """Memory over it."""
    return {
        "tierloom.config": {
            "version": 1, "name": "over-awkward",
            "tiers": {
                "hot": {"use": "memory", "capacity": capacity},
                "cold": {"use": "awkward:Awkward", "timeout": "300 ms", "latency": "1 ms"},
            },
            "graphs": {
                "store": {"deadline": "10 s", "stages": {
                    "keys": {"use": "hash"}, "fresh": {"use": "lookup", "want": "absent"},
                    "pack": {"use": "gather"}, "hot": {"use": "put", "tier": "hot"},
                    "cold": {"use": "put", "tier": "cold", "from": "pack", "when_full": "block"},
                }},
                "retrieve": {"deadline": "500 ms", "stages": {
                    "keys": {"use": "hash"}, "plan": {"use": "lookup", "tiers": ["hot", "cold"]},
                    "fetch": {"use": "get", "promote": "hot"}, "grow": {"use": "decode"},
                    "place": {"use": "scatter"},
                }},
            },
        }
    } | more  # fmt: skip
