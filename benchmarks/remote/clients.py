"""Clients of stores, with nothing around them: `put` and `get` of objects by names."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import buckets

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from pathlib import Path

    from tierloom.stages.kv.object import Object
    from tierloom.stages.tiers.contract.tier import Tier

    Named = tuple[str, Object]

COUNT, SLOT = 8, 33 << 20
"""Objects of a call, and bytes that have room for one."""
AT_ONCE, PART = 4, 4 << 20


class Bare:
    """Built from the tier's options, the tier, which is opened before the first call, and a folder
    of its own."""

    def __init__(self, options: dict[str, Any], tier: Tier, folder: Path) -> None: ...

    def cpu(self) -> float:
        """Seconds that the client's process has spent."""
        return time.process_time()

    async def put(self, named: Sequence[Named]) -> None:
        raise NotImplementedError

    async def get(self, named: Sequence[Named]) -> None:
        raise NotImplementedError

    async def drop(self, named: Sequence[Named]) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


class Obstore(Bare):
    def __init__(self, options: dict[str, Any], tier: Tier, folder: Path) -> None:
        import obstore
        from obstore.store import S3Store

        self.obs = obstore
        self.store = S3Store(
            buckets.NAME, prefix="bare", endpoint=options["endpoint"], region="us-east-1",
            unsigned_payload=True, disable_bulk_delete=True, client_options={"allow_http": True},
        )  # fmt: skip

    async def put(self, named: Sequence[Named]) -> None:
        async def one(each: Named) -> None:
            name, obj = each
            body = obj.lease.view[: obj.header.nbytes]
            await self.obs.put_async(self.store, name, body, mode="create", use_multipart=False)

        await few(one, named)

    async def get(self, named: Sequence[Named]) -> None:
        async def one(each: Named) -> None:
            name, nbytes = each[0], each[1].header.nbytes

            async def part(start: int) -> None:
                end = min(nbytes, start + PART)
                await self.obs.get_range_async(self.store, name, start=start, end=end)

            await few(part, range(0, nbytes, PART))

        await few(one, named)

    async def drop(self, named: Sequence[Named]) -> None:
        await self.obs.delete_async(self.store, [name for name, _ in named])


async def few(work: Callable[[Any], Awaitable[None]], items: Iterable[Any]) -> None:
    """All of it, AT_ONCE at a time."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(item: Any) -> None:
        async with gate:
            await work(item)

    await asyncio.gather(*map(one, items))
