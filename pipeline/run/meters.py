"""Counters of each stage, put on by the runner: no stage imports this, and none can forget it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Meter:
    """What one stage did. Plain attributes, added to on the loop once per batch."""

    batches: int = 0
    chunks: int = 0
    seconds: float = 0.0
    """Busy or waiting inside the stage; the share of time it is the bottleneck."""
    broken: int = 0

    def read(self) -> dict[str, Any]:
        return asdict(self)


def metered(
    run: Callable[[Any], Awaitable[Any]], meter: Meter, count: Callable[[Any], int]
) -> Callable[[Any], Awaitable[Any]]:
    """`run`, with its calls, chunks and seconds counted."""

    async def counted(item: Any) -> Any:
        start = time.perf_counter()
        try:
            return await run(item)
        finally:
            meter.seconds += time.perf_counter() - start
            meter.batches += 1
            meter.chunks += count(item)

    return counted
