"""Counters of each stage, put on by the runner: no stage imports this, and none can forget it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Meter:
    """What one stage did. Plain attributes, added to on the loop once per batch."""

    batches: int = 0
    chunks: int = 0
    seconds: float = 0.0
    """Busy or waiting inside the stage; the share of time it is the bottleneck."""
    broken: int = 0
    watch: Callable[[Any, float, float], None] | None = None
    """Told of each call: what it worked on, begin and end in seconds of `time.perf_counter`."""

    enter: Callable[[Any], Callable[[float, float], None]] | None = None
    """Called before each call; what it gives, after it, with begin and end."""

    def read(self) -> dict[str, Any]:
        return {
            "batches": self.batches, "chunks": self.chunks, "seconds": self.seconds,
            "broken": self.broken,
        }  # fmt: skip


def metered(
    run: Callable[[Any], Awaitable[Any]], meter: Meter, count: Callable[[Any], int]
) -> Callable[[Any], Awaitable[Any]]:
    """`run`, with its calls, chunks and seconds counted."""

    async def counted(item: Any) -> Any:
        enter = meter.enter
        leave = enter(item) if enter is not None else None
        start = time.perf_counter()
        try:
            return await run(item)
        finally:
            end = time.perf_counter()
            meter.seconds += end - start
            meter.batches += 1
            meter.chunks += count(item)
            if (watch := meter.watch) is not None:
                watch(item, start, end)
            if leave is not None:
                leave(start, end)

    return counted
