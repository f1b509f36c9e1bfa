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

    return counted
