"""What the graph costs: CPU time per chunk where there is next to nothing to copy.

    python -m pytest benchmarks/bench_graph.py --benchmark-only

`runner`: a request of 1, 4 or 16 chunks (one batch) through stages that do nothing, two coroutines
and one thread, so that only submitting, the runner and the receipt are left. `store`, `retrieve`
and `lookup`: the real stages over 4,096 tokens (16 chunks) of a model so small that its bytes do
not count; hashing, headers and the index are in there. `us_per_chunk` is CPU time of all threads.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cases import BLOCK, CHUNK, TINY, Engine, opened
from yardstick import Took, timed

import tierloom

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

    from tierloom import Pipeline

ROUNDS, CALLS = 15, 40
TOKENS = 4096
CAPACITY = "32 MiB"
RUNNER = {
    "version": 1,
    "name": "noop",
    "chunk": {"tokens": BLOCK, "grain": BLOCK, "group": 4},
    "tiers": {},
    "graphs": {
        "store": {
            "stages": {
                "cut": {"use": "noop_stages:Cut"},
                "begin": {"use": "noop_stages:Begin"},
                "thread": {"use": "noop_stages:Thread"},
                "end": {"use": "noop_stages:End"},
            }
        }
    },
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(TINY, TOKENS)


@pytest.fixture(scope="module")
def pipe(engine: Engine) -> Iterator[Pipeline]:
    with opened(engine, {"hot": {"use": "memory", "capacity": CAPACITY}}) as pipe:
        yield pipe


@pytest.mark.parametrize("chunks", [1, 4, 16])
def test_runner(chunks: int, engine: Engine, benchmark: BenchmarkFixture) -> None:
    with tierloom.open(RUNNER, layout=engine.layout, model="bench") as pipe:
        tokens, slots = engine.prompt()[: chunks * BLOCK], engine.source[: chunks * BLOCK]
        run = lambda _: pipe.store(tokens, engine.caches, slots).wait()  # noqa: E731
        per_chunk(benchmark, run, lambda: None, chunks, len(tokens))


@pytest.mark.parametrize("chunks", [1, 4, 16])
def test_store(chunks: int, engine: Engine, pipe: Pipeline, benchmark: BenchmarkFixture) -> None:
    slots = engine.source[: chunks * CHUNK]
    run = lambda tokens: pipe.store(tokens, engine.caches, slots).wait()  # noqa: E731
    per_chunk(benchmark, run, lambda: engine.prompt()[: len(slots)], chunks, len(slots))


@pytest.mark.parametrize("chunks", [1, 4, 16])
def test_retrieve(chunks: int, engine: Engine, pipe: Pipeline, benchmark: BenchmarkFixture) -> None:
    tokens = kept(engine, pipe)[: chunks * CHUNK]
    slots = engine.target[: len(tokens)]
    run = lambda _: pipe.retrieve(tokens, engine.caches, slots).wait()  # noqa: E731
    per_chunk(benchmark, run, lambda: None, chunks, len(tokens))


@pytest.mark.parametrize("chunks", [1, 16])
def test_lookup(chunks: int, engine: Engine, pipe: Pipeline, benchmark: BenchmarkFixture) -> None:
    tokens = kept(engine, pipe)[: chunks * CHUNK]
    per_chunk(benchmark, lambda _: pipe.lookup(tokens), lambda: None, chunks, len(tokens))


def kept(engine: Engine, pipe: Pipeline) -> np.ndarray:
    """A prompt that is stored, and comes back as it was."""
    tokens = engine.prompt()
    pipe.store(tokens, engine.caches, engine.source).wait()
    engine.blank()
    assert pipe.retrieve(tokens, engine.caches, engine.target).wait().tokens == TOKENS
    assert engine.same()
    return tokens


def per_chunk(
    benchmark: BenchmarkFixture, run: Callable[[Any], Any], prepare: Callable[[], Any],
    chunks: int, tokens: int,
) -> None:  # fmt: skip
    """`CALLS` requests, one after another, per round."""
    took: list[Took] = []

    def setup() -> tuple[tuple[list[Any]], dict[str, Any]]:
        return ([prepare() for _ in range(CALLS)],), {}

    def calls(arguments: list[Any]) -> None:
        def all_of_them() -> None:
            for argument in arguments:
                result = run(argument)
                done = getattr(result, "tokens", result)
                if done != tokens or getattr(result, "lost", {}):
                    raise RuntimeError(f"{tokens} tokens were asked: {result}")

        took.append(timed(all_of_them))

    for _ in range(3):
        calls(setup()[0][0])
    took.clear()
    benchmark.group = "graph"
    benchmark.pedantic(calls, setup=setup, rounds=ROUNDS, iterations=1)
    cpu = [t.cpu / CALLS / chunks * 1e6 for t in took]
    benchmark.extra_info.update(
        us_per_chunk=round(statistics.median(cpu), 2),
        us_per_chunk_best=round(min(cpu), 2),
        us_wall_per_request=round(statistics.median(t.wall for t in took) / CALLS * 1e6, 1),
    )
