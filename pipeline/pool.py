"""A few daemon threads for blocking calls.

Their number is fixed, so that a disk that hangs occupies these threads and no more, and a process
can end while one of them is stuck. A call costs two queue operations and one wake of the loop.
"""

from __future__ import annotations

import asyncio
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = tuple[
        Callable[..., Any], tuple[Any, ...], asyncio.AbstractEventLoop, asyncio.Future[Any]
    ]


class Pool:
    """`await pool(fn, *args)`. A caller that is cancelled leaves the call running on its own."""

    def __init__(self, threads: int, name: str) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"tierloom-{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def __call__(self, fn: Callable[..., Any], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._calls.put((fn, args, loop, future))
        return await future

    def close(self, timeout: float = 1.0) -> None:
        """Let the threads end; one that is stuck is left behind."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(timeout)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            fn, args, loop, future = call
            result, error = None, None
            if not future.cancelled():
                try:
                    result = fn(*args)
                except BaseException as e:
                    error = e
            try:
                loop.call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return
            del call, fn, args, future, result, error


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
