"""A few daemon threads for blocking calls.

Their number is fixed, so that a disk that hangs occupies these threads and no more, and a process
can end while one of them is stuck. A call costs two queue operations and one wake of the loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from tierloom.stages.memory.arena import Lease
from tierloom.stages.memory.held import Call

Queued = tuple[Call, asyncio.AbstractEventLoop, asyncio.Future[Any]]


class Pool:
    """`await pool(fn, *args, leases=...)`. A caller that is cancelled abandons the call: it
    runs on when a thread has taken it, and never begins when none has."""

    def __init__(self, threads: int, name: str) -> None:
        self._turns: SimpleQueue[bool] = SimpleQueue()
        """One for each call that waits: True; False ends a thread."""
        self._calls: tuple[deque[Queued], ...] = (deque(), deque(), deque())
        """By how late they may be."""
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"tierloom-{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def __call__(
        self, fn: Callable[..., Any], *args: Any, leases: Iterable[Lease] = (), later: int = 0
    ) -> Any:
        """What `fn` returned or raised. `leases`: all whose memory it reads or writes; they are
        held until its thread is through. `later`: 0 to 2; calls with less go first. Raises
        RuntimeError when the pool is closed."""
        if self._closed:
            raise RuntimeError("a call came to a pool that is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        call = Call(fn, args, leases)
        self._calls[later].append((call, loop, future))
        self._turns.put(True)
        try:
            return await future
        finally:
            call.drop()

    def close(self, timeout: float = 1.0) -> None:
        """Let the threads end; one that is stuck is abandoned, with the leases of its call."""
        self._closed = True
        for _ in self._threads:
            self._turns.put(False)
        for thread in self._threads:
            thread.join(timeout)
        with suppress(Empty):  # what no thread came to
            while True:
                if self._turns.get_nowait():
                    self._next()[0].drop()
        for thread in self._threads:
            if thread.is_alive():  # it ends if it ever comes back
                self._turns.put(False)

    def _next(self) -> Queued:
        """The call whose turn it is. From any thread that has taken a turn."""
        while True:  # one that comes meanwhile may lie where this has looked
            for calls in self._calls:
                with suppress(IndexError):
                    return calls.popleft()

    def _work(self) -> None:
        while self._turns.get():
            queued = self._next()
            call, loop, future = queued
            result, error = None, None
            if call.take():
                try:
                    result = call.run()
                except BaseException as e:
                    error = e
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, future, result, error)
            del queued, call, future, result, error


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):  # which no future takes
        future.set_exception(RuntimeError(f"a call in a thread raised {error!r}"))
    else:
        future.set_exception(error)
