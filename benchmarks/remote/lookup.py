"""How long a tier takes to say which of 64 chunks it has."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from cases import CHUNK
from yardstick import timed

if TYPE_CHECKING:
    from tierloom import Pipeline

CHUNKS = 64
TIMES, SECONDS = 300, 10.0
"""So often at most, and so long."""


def lookup(pipe: Pipeline) -> dict[str, float]:
    """Milliseconds. None of the keys is there; the server looks for all of them all the same.

    `p50` and `p99` of asking the tier, from another thread as an engine does; `whole` is p50 of a
    lookup through the public API, whose 16,384 tokens are hashed first.
    """
    asked, whole = [], []
    ask, has = pipe._portal.call, pipe.tiers["cold"].has
    end = time.perf_counter() + SECONDS
    for seed in range(TIMES):
        make = np.random.default_rng(seed)
        keys = [make.bytes(32) for _ in range(CHUNKS)]
        asked.append(timed(partial(ask, has, keys)).wall)
        tokens = make.integers(0, 128_000, CHUNKS * CHUNK).astype(np.int32)
        whole.append(timed(lambda tokens=tokens: pipe.begin_lookup(tokens).result(10)).wall)
        if time.perf_counter() > end:
            break
    asked.sort()
    return {
        "p50": 1e3 * statistics.median(asked), "p99": 1e3 * asked[int(len(asked) * 0.99)],
        "whole": 1e3 * statistics.median(whole), "times": len(asked),
    }  # fmt: skip
