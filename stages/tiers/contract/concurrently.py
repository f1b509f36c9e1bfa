"""Work on many things at once, a few at a time; how much of a row is there, by a few questions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

from tierloom.stages.tiers.contract.client_errors import is_failure

T = TypeVar("T")
R = TypeVar("R")

_ASKED = 3
"""Requests of a search at once: of 64 chunks it needs 11 at most, in 3 round trips."""


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


async def search_prefix(
    exists: Callable[[Sequence[T]], Awaitable[list[bool]]], keys: Sequence[T]
) -> int:
    """How many of `keys`, in which those that exist come first; asks for a few of them at once."""
    search = PrefixSearch(len(keys), _ASKED)
    while search.asks:
        search.told(await exists([keys[i] for i in search.asks]))
    return search.length


class PrefixSearch:
    """How many of a row are there, where those that are there come first: `asks` for some places,
    and is `told` what is there, until `length` is known.

    The first round asks for both ends as well, since mostly all are there, or none. Each further
    one divides what is left by `width` + 1: of 782 by 3 in 5 rounds, by 1 in 10. Where some are
    missing before others, the length is any that fits what was told.
    """

    def __init__(self, count: int, width: int) -> None:
        """`width`: places to ask for at once."""
        self.length, self._end, self._width = 0, count, width
        self.asks = sorted({*self._between(), count - 1}) if count else []
        """Indices to be asked for; empty: `length` is known."""

    def told(self, found: Sequence[bool]) -> None:
        """What is at the places of `asks`."""
        there = dict(zip(self.asks, found, strict=True))
        self._end = min((i for i, kept in there.items() if not kept), default=self._end)
        known = (i + 1 for i, kept in there.items() if kept and i < self._end)
        self.length = max(known, default=self.length)
        self.asks = self._between()

    def _between(self) -> list[int]:
        """Places that divide what is not known, evenly; of all of it, the first and some others."""
        left, parts = self._end - self.length, self._width + 1
        first = not self.length
        places = {self.length + left * part // parts for part in range(0 if first else 1, parts)}
        return sorted(place for place in places if place < self._end)
