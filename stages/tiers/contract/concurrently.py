"""Work on many things at once, a few at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

from tierloom.stages.tiers.contract.client_errors import is_failure

T = TypeVar("T")
R = TypeVar("R")


async def map_concurrently(
    work: Callable[[T], Awaitable[R]], items: Sequence[T], width: int
) -> list[R]:
    """`[await work(item) for item in items]`, begun in order, at most `width` at once.

    The first exception ends the rest and is raised as it is, not in a group; also one that is no
    `Exception`.
    """
    if len(items) == 1:
        return [await work(items[0])]
    done: dict[int, R] = {}
    failed: list[BaseException] = []
    waiting = iter(enumerate(items))

    async def worker() -> None:
        for i, item in waiting:
            try:
                done[i] = await work(item)
            except BaseException as error:  # noqa: PERF203
                if not is_failure(error):
                    raise
                failed.append(error)
                group.cancel_scope.cancel()
                return

    async with anyio.create_task_group() as group:
        for _ in range(min(width, len(items))):
            group.start_soon(worker)
    if failed:
        raise failed[0]
    return [done[i] for i in range(len(items))]
