"""One loop thread per worker process: a mailbox in, results out through futures and gates.

The only file that knows both threads. The engine's thread appends to a deque and wakes the loop
once for a burst of posts (2.5 us); it never waits here.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import anyio

from tierloom.stages.contract.request import Receipt
from tierloom.stages.contract.ticket import Ticket

log = logging.getLogger(__name__)


class Portal:
    """Runs `main(stop)` on a loop of its own until `close()`."""

    def __init__(
        self, main: Callable[[asyncio.Event, Callable[[], None]], Coroutine[Any, Any, None]]
    ) -> None:
        """`main` gets an event that is set when it should end, and calls its second argument once
        ready."""
        self._main = main
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._awake = False
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="tierloom-portal", daemon=True)

    def start(self) -> None:
        """Returns when `main` is ready; raises what it raised before that."""
        self._thread.start()
        self._ready.result()

    def post(self, fn: Callable[..., None], *args: Any) -> None:
        """Have `fn(*args)` called on the loop, soon and in order. Any thread; never waits."""
        self._inbox.append((fn, args))
        if not self._awake:
            self._awake = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the loop has closed: `close()` finished every request before
                self._inbox.clear()

    def begin(self, fn: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Future[Any]:
        """Start a coroutine on the loop."""
        return self.start_task(fn(*args))

    def start_task(self, task: Coroutine[Any, Any, Any]) -> Future[Any]:
        """The same, of one that is made already."""
        return asyncio.run_coroutine_threadsafe(task, self._loop)

    def call(
        self, fn: Callable[..., Coroutine[Any, Any, Any]], *args: Any, timeout: float = 30.0
    ) -> Any:
        """Run a coroutine on the loop and wait for its result: for rare calls, not for the hot
        path."""
        return self.begin(fn, *args).result(timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Ask `main` to end and wait for the thread."""
        if self._thread.is_alive():
            self.post(self._stop.set)
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _drain(self) -> None:
        self._awake = False  # before the emptying, so that no post is missed
        while self._inbox:
            fn, args = self._inbox.popleft()
            try:
                fn(*args)
            except Exception:  # what was posted after it is not to wait for the next post
                log.exception("%s failed on the loop", getattr(fn, "__qualname__", fn))

    def _run(self) -> None:
        try:
            asyncio.run(self._life())
        except BaseException as e:
            if not self._ready.done():
                self._ready.set_exception(e)
            else:
                raise

    async def _life(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        await self._main(self._stop, self._is_ready)

    def _is_ready(self) -> None:
        self._ready.set_result(None)


async def finished(ticket: Ticket) -> Receipt:
    """A ticket's receipt, on whatever loop this is; a cancelled caller cancels the request."""
    try:
        receipt: Receipt = await awaited(ticket.future)
    except BaseException:
        ticket.cancel()
        raise
    return receipt


async def awaited(future: Future[Any]) -> Any:
    """A concurrent future's result, on whatever loop this is."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # trio
        return await anyio.to_thread.run_sync(future.result, abandon_on_cancel=True)
    return await asyncio.wrap_future(future)
