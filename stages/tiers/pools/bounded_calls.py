"""Blocking calls of a client that may hang: a few at a time, each with a limited wait.

A cancelled caller does not end its call. The call keeps its slot until its thread is done, so a
client that hangs blocks only `limit` threads of the pool; when abandoned calls have all slots, the
tier is down.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import anyio

from tierloom.stages.errors import TierDown
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.contract.tier import TierCounts

_TURN = 0.02  # seconds between two looks at calls that nobody waits for
_PATIENCE = 0.25  # seconds after which an abandoned call counts as hanging


@dataclass(eq=False, slots=True)
class _RunningCall:
    """One call. Good until its thread is through, or it was left before a thread took it."""

    begun: float
    started: bool = False
    left: bool = False


class BoundedCalls:
    """`await calls(fn, *args, leases=...)` runs `fn` in a thread of `pool`, `limit` at once.

    It may outlive its caller; `leases`, all that it touches, are held meanwhile.
    """

    def __init__(self, pool: Callable[..., Awaitable[Any]], limit: int, counts: TierCounts) -> None:
        self.limit = limit
        self._pool, self._counts = pool, counts
        self._lock = threading.Lock()
        self._running: set[_RunningCall] = set()
        self._freed: anyio.Event | None = None

    async def __call__(
        self, fn: Callable[..., Any], *args: Any, leases: Iterable[Lease] = ()
    ) -> Any:
        """What `fn` returned or raised. Raises TierDown when `limit` calls hang."""
        call = _RunningCall(time.monotonic())
        while not self._admit(call):
            self._freed = self._freed or anyio.Event()
            with anyio.move_on_after(_TURN):
                await self._freed.wait()
        try:
            return await self._pool(self._run, call, fn, args, leases=leases)
        finally:
            self._leave(call)

    async def idle(self, seconds: float) -> bool:
        """Wait until no call runs any more; whether that came true in time."""
        with anyio.move_on_after(seconds):
            while self._running:  # noqa: ASYNC110 (they end in other threads)
                await anyio.sleep(_TURN)
        return not self._running

    def _admit(self, call: _RunningCall) -> bool:
        with self._lock:
            if len(self._running) < self.limit:
                call.begun = time.monotonic()
                self._running.add(call)
                return True
            old = time.monotonic() - _PATIENCE
            if all(other.left and other.begun < old for other in self._running):
                raise TierDown(f"{self.limit} calls of its client do not return")
            return False

    def _run(self, call: _RunningCall, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with self._lock:
            if call.left:  # before a thread was free
                return None
            call.started = True
        try:
            return fn(*args)
        finally:
            with self._lock:
                self._running.discard(call)

    def _leave(self, call: _RunningCall) -> None:
        with self._lock:
            if call in self._running:
                call.left = True
                if call.started:
                    extra = self._counts.extra
                    extra["abandoned"] = extra.get("abandoned", 0) + 1
                else:
                    self._running.discard(call)
        if self._freed is not None:
            self._freed.set()
            self._freed = None
