"""Tiers that fail on purpose, for tests of pipelines.

    warm: {use: slow, capacity: 1 GiB, delay: 20 ms}

Each is a memory tier with one fault.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import anyio

from tierloom.stages.errors import Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.options import Seconds, Size
from tierloom.stages.tiers.contract.tier import Read, TierContext
from tierloom.stages.tiers.memory.tier import Memory, MemoryOptions

Point = Literal["open", "has", "read", "put", "first_byte"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowOptions(MemoryOptions):
    """Options of a slow tier."""

    delay: Seconds = 0.05
    """Delay of each call."""
    bandwidth: Size = 0
    """Bytes per second of reads and puts; 0: no limit."""


class Slow(Memory):
    """Answers slowly."""

    Options = SlowOptions
    options: SlowOptions

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        await anyio.sleep(self.options.delay)
        return await super().exists(keys)

    async def read(self, reads: Sequence[Read]) -> None:
        await anyio.sleep(self.options.delay)
        await super().read(reads)
        await self._carry([read.object for read in reads if read.object is not None])

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        await anyio.sleep(self.options.delay)
        await self._carry(objects)
        return await super().put(objects)

    async def _carry(self, objects: Sequence[Object]) -> None:
        if self.options.bandwidth:
            nbytes = sum(obj.header.nbytes for obj in objects)
            await anyio.sleep(nbytes / self.options.bandwidth)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlakyOptions(MemoryOptions):
    """Options of a flaky tier."""

    rate: float = 0.1
    """Fraction of calls that fail, 0 to 1."""
    seed: int = 0
    """Seed of the random failures."""
    corrupt: bool = False
    """Deliver objects with one flipped bit instead of raising."""

    def __post_init__(self) -> None:
        super(FlakyOptions, self).__post_init__()
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must be between 0 and 1, got {self.rate}")


class Flaky(Memory):
    """Raises OSError now and then, or delivers damaged bytes."""

    Options = FlakyOptions
    options: FlakyOptions

    def __init__(self, options: FlakyOptions, ctx: TierContext, **kwargs: Any) -> None:
        super().__init__(options, ctx, **kwargs)
        self._random = random.Random(options.seed)

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        self._stumble()
        return await super().exists(keys)

    async def read(self, reads: Sequence[Read]) -> None:
        self._stumble()
        fresh = [read for read in reads if read.object is None]
        await super().read(reads)
        for read in fresh:
            if self.options.corrupt and read.object is not None and self._now():
                read.object = self._damaged(read.object)

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        self._stumble()
        return await super().put(objects)

    def _now(self) -> bool:
        return self._random.random() < self.options.rate

    def _stumble(self) -> None:
        if not self.options.corrupt and self._now():
            raise OSError("flaky tier")

    def _damaged(self, obj: Object) -> Object:
        """A copy in a lease of its own, one bit of one frame turned; `obj`'s is released."""
        lease = self.ctx.arena.lease(obj.lease.nbytes)
        lease.view[:] = obj.lease.view
        frame = self._random.choice(obj.header.frames)
        at = frame.offset + self._random.randrange(frame.stored)
        lease.view[at] ^= 1 << self._random.randrange(8)
        obj.lease.release()
        return Object(obj.header, lease, loaded=obj.loaded, sealed=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class StuckOptions(MemoryOptions):
    """Options of a stuck tier."""

    at: Point = "read"
    """The call that never returns; `first_byte`: a read, once its memory is leased."""

    def __post_init__(self) -> None:
        super(StuckOptions, self).__post_init__()
        if self.at not in get_args(Point):
            raise ValueError(f"at is {self.at!r}; known: {', '.join(get_args(Point))}")


class Stuck(Memory):
    """Never returns, until it is cancelled."""

    Options = StuckOptions
    options: StuckOptions

    async def open(self) -> None:
        await self._reach("open")
        await super().open()

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        await self._reach("has")
        return await super().exists(keys)

    async def read(self, reads: Sequence[Read]) -> None:
        await self._reach("read")
        if self.options.at == "first_byte":
            kept = [self._index.get(read.key) for read in reads]
            leases = [self.ctx.arena.lease(entry.nbytes) for entry in kept if entry is not None]
            try:
                await anyio.sleep_forever()
            finally:
                for lease in leases:
                    lease.release()
        await super().read(reads)

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        await self._reach("put")
        return await super().put(objects)

    async def _reach(self, point: Point) -> None:
        if self.options.at == point:
            await anyio.sleep_forever()


class Full(Memory):
    """Refuses every object."""

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        self.counts.refused += len(objects)
        return [Lost.NO_ROOM] * len(objects)
