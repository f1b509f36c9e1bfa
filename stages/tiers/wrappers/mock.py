"""mock: a remote store that is a dictionary of this process, as far away as you say.

    cold: {use: mock, latency: 2 ms, bandwidth: 1 GiB, loss: 0.01}

For trying out what a pipeline does with a store of that kind before there is one. Unlike `slow`,
which is a memory tier that answers late, it has no index that `find` could ask, and objects travel.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import anyio

from tierloom.stages.options import Seconds, Size
from tierloom.stages.tiers.contract.key_value import Blobs
from tierloom.stages.tiers.contract.tier import TierContext, TierStat


@dataclass(frozen=True, kw_only=True, slots=True)
class MockOptions:
    """Options of a mock tier."""

    capacity: Size = 1 << 30
    """Most bytes to store; the oldest are evicted first."""
    latency: Seconds = 0.001
    """Delay of each answer; objects of one call wait at the same time."""
    bandwidth: Size = 0
    """Bytes per second of its connection, both ways together; 0: no limit."""
    loss: float = 0.0
    """Fraction of objects that turn out to be lost when they are read, 0 to 1."""
    seed: int = 0
    """Seed of the random losses."""

    def __post_init__(self) -> None:
        if self.capacity <= 0 or min(self.latency, self.bandwidth) < 0:
            raise ValueError("capacity must be positive, latency and bandwidth not negative")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"loss must be between 0 and 1, got {self.loss}")


class Mock(Blobs):
    """Loses everything when the process ends."""

    Options = MockOptions
    options: MockOptions

    def __init__(self, options: MockOptions, ctx: TierContext) -> None:
        super().__init__(options, ctx)
        self._kept: dict[str, bytearray] = {}
        self._random = random.Random(options.seed)
        self._line_free = 0.0

    async def size(self, name: str) -> int:
        await self._carry(0)
        return len(self._kept.get(name, b""))

    async def get_value(self, name: str) -> bytearray | None:
        if self.options.loss and self._random.random() < self.options.loss:
            self._forget(name)
        data = self._kept.get(name)
        await self._carry(len(data or b""))
        return data

    async def put_value(self, name: str, data: bytearray) -> bool:
        await self._carry(len(data))
        if len(data) > self.options.capacity:
            return False
        while self._holdings.stat.nbytes + len(data) > self.options.capacity:
            self._forget(next(iter(self._kept)))
            self.counts.evicted += 1
        self._kept[name] = data
        return True

    async def delete_value(self, name: str) -> None:
        self._kept.pop(name, None)

    async def names(self, prefix: str) -> Iterable[str]:
        return [name for name in self._kept if name.startswith(prefix)]

    def stat(self) -> TierStat:
        return super().stat()._replace(capacity=self.options.capacity)

    def _forget(self, name: str) -> None:
        if data := self._kept.pop(name, None):
            self._holdings.add(-1, -len(data))

    async def _carry(self, nbytes: int) -> None:
        """Wait for an answer: one after another on the line, all at once in latency."""
        now = anyio.current_time()
        if self.options.bandwidth:
            self._line_free = max(now, self._line_free) + nbytes / self.options.bandwidth
        await anyio.sleep(max(0.0, self._line_free - now) + self.options.latency)
