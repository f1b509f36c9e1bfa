"""CPU time of the process for one request of one chunk, over many of them.

    PYTHONPATH=benchmarks .venv/bin/python benchmarks/one_chunk.py [REQUESTS]

Against memory, with a model so small that its bytes hardly count. Time of all threads, the
caller's included, in ms per request: the median and the best of ten runs of a tenth each.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING

from cases import TINY, TINY_CHUNK, Engine, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

RUNS = 10
CHUNK = TINY_CHUNK["tokens"]


def told(name: str, requests: int, request: Callable[[], object]) -> None:
    for _ in range(200):
        request()
    took = []
    for _ in range(RUNS):
        began = time.process_time()
        for _ in range(requests // RUNS):
            request()
        took.append(1e3 * (time.process_time() - began) / (requests // RUNS))
    print(f"{name}: {statistics.median(took):.3f} ms, best {min(took):.3f}")


def prompts(engine: Engine) -> Iterator[np.ndarray]:
    while True:
        yield engine.prompt()


def main(requests: int) -> None:
    engine = Engine(TINY, CHUNK)
    tiers = {"hot": {"use": "memory", "capacity": "32 MiB"}}
    with opened(engine, tiers, chunk=TINY_CHUNK) as pipe:
        fresh = prompts(engine)
        told(
            "store", requests,
            lambda: pipe.store(next(fresh), engine.caches, engine.source).wait(),
        )  # fmt: skip
        tokens = next(fresh)
        pipe.store(tokens, engine.caches, engine.source).wait()
        got = pipe.retrieve(tokens, engine.caches, engine.target).wait()
        assert got.tokens == CHUNK
        told(
            "retrieve", requests,
            lambda: pipe.retrieve(tokens, engine.caches, engine.target).wait(),
        )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
