"""Whether kept KV is loaded or computed again: whichever ends sooner."""

from __future__ import annotations

from collections.abc import Iterable


def worth_loading(costs: Iterable[tuple[int, float]], total: int, rate: float) -> int:
    """How many of these chunks, (tokens, seconds to load them) each, to load for the sooner end.

    The rest of `total` tokens is computed at `rate` tokens/s.
    """
    best, count, spent, tokens = total / rate, 0, 0.0, 0
    for n, (size, cost) in enumerate(costs, start=1):
        spent += cost
        tokens += size
        ends = spent + (total - tokens) / rate
        if ends <= best:
            best, count = ends, n
    return count
