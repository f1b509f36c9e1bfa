"""Orders that a door has taken: each is done once, however often it is sent, and remembered."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

import anyio

from tierloom.stages.errors import Closed, InputError, TierDown

KEEP = 3600.0
"""Seconds for which it is known what came of an order."""
_MOST = 1024
"""Orders remembered at once."""
Parts = dict[str, dict[str, Any]]
State = Literal["running", "done", "failed", "late"]


@dataclass(slots=True)
class TakenOrder:
    """`failed`: a part did not do it, or it was wrong; `late`: its deadline came first, and what
    was not done by then was left."""

    id: str
    order: str
    said: bytes
    """The digest of its body."""
    task: asyncio.Task[Parts]
    ended: float = 0.0
    state: State = "running"
    parts: Parts = field(default_factory=dict)
    detail: str = ""


class OrderBook:
    """On the door's loop. It ends with the process, and so does what its orders did to memory."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: monotonic, in seconds."""
        self._clock = clock
        self._taken: dict[str, TakenOrder] = {}

    async def once(
        self, id: str, order: str, said: Mapping[str, Any], seconds: float,
        work: Callable[[], Awaitable[Parts]],
    ) -> TakenOrder:  # fmt: skip
        """The order, ended; who sends it again gets the same one. A caller that leaves changes
        nothing. Raises what `work` does, again for each who asks; InputError where the id is
        another order's."""
        taken = self.find(id)
        body = sha256(json.dumps([order, said], sort_keys=True).encode()).digest()
        if taken is None:
            self._make_room()
            task = asyncio.create_task(self._within(seconds, work))
            taken = self._taken[id] = TakenOrder(id, order, body, task)
            task.add_done_callback(lambda _: self._end(taken))
        elif taken.said != body:
            raise InputError(
                f"Idempotency-Key {id!r:.200} is another order's, {taken.order}: draw a new one"
            )
        await asyncio.wait([taken.task])
        self._end(taken)
        if taken.task.cancelled():
            raise Closed(taken.detail)
        error = taken.task.exception()
        if error is not None and not isinstance(error, TimeoutError):
            raise error
        return taken

    def find(self, id: str) -> TakenOrder | None:
        """None: it was never taken here, or too long ago."""
        over = [k for k, t in self._taken.items() if t.ended and self._clock() - t.ended > KEEP]
        for key in over:
            del self._taken[key]
        return self._taken.get(id)

    async def _within(self, seconds: float, work: Callable[[], Awaitable[Parts]]) -> Parts:
        with anyio.fail_after(seconds):
            return await work()

    def _end(self, taken: TakenOrder) -> None:
        if taken.ended:
            return
        taken.ended = self._clock()
        if taken.task.cancelled():
            taken.state, taken.detail = "failed", "what it was for was closed meanwhile"
            return
        error = taken.task.exception()
        if error is None:
            taken.parts = taken.task.result()
            wrong = any("error" in part for part in taken.parts.values())
            taken.state = "failed" if wrong else "done"
        else:
            taken.state = "late" if isinstance(error, TimeoutError) else "failed"
            taken.detail = str(error) or "its deadline came first"

    def _make_room(self) -> None:
        """Raises TierDown where all that are remembered are under way."""
        while len(self._taken) >= _MOST:
            ended = next((key for key, taken in self._taken.items() if taken.ended), None)
            if ended is None:
                raise TierDown(f"{_MOST} orders are under way: try again")
            del self._taken[ended]
