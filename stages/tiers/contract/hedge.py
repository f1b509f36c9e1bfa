"""A second try beside the first, when the first takes long; what comes first is taken.

After "The Tail at Scale" (Dean and Barroso, CACM 56, 2013): a hedged request bounds the wait by
that of the quicker of two, for the price of those few second tries.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio


async def race(
    first: Callable[[], Awaitable[bool]], second: Callable[[], Awaitable[bool]], patience: float
) -> None:
    """Run `first`, and `second` beside it when `first` has not ended after `patience` seconds.

    Whichever gives True ends the other; one that gives False leaves the other to it. A `first` that
    ends in time, with whatever result, is all that is run.
    """
    ended = anyio.Event()

    async def run(attempt: Callable[[], Awaitable[bool]]) -> None:
        if await attempt():
            tasks.cancel_scope.cancel()
        ended.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, first)
        with anyio.move_on_after(patience):
            await ended.wait()
        if not ended.is_set():
            tasks.start_soon(run, second)
