"""What the graph costs: CPU time per chunk where there is next to nothing to copy.

    python -m pytest benchmarks/bench_graph.py --benchmark-only

`runner`: requests of 1, 4 or 16 chunks (one batch) through stages that do nothing, two coroutines
and one thread, so that only the call, the runner and the receipt are left. `store`, `retrieve` and
`lookup`: the real stages over a model so small that its bytes hardly count; hashing, headers and
the index are in there. `us_per_chunk` is CPU time of all threads without that of the copy kernels,
which stands in `us_kernels`.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest
from cases import BLOCK, TINY, TINY_CHUNK, Engine, opened
from yardstick import Took, idle, timed

import tierloom
from tierloom.triton_kernels.paged_copy import cpu as paged_copy_cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from pytest_benchmark.fixture import BenchmarkFixture

    from tierloom import Pipeline

ROUNDS, CALLS = 15, 40
CHUNK = TINY_CHUNK["tokens"]
RUNNER = {
    "version": 1,
    "name": "noop",
    "chunk": {"tokens": BLOCK, "grain": BLOCK, "group": 1},
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
    return Engine(TINY, 16 * CHUNK)


@pytest.fixture(scope="module")
def pipe(engine: Engine) -> Iterator[Pipeline]:
    tiers = {"hot": {"use": "memory", "capacity": "32 MiB"}}
    with opened(engine, tiers, chunk=TINY_CHUNK) as pipe:
        yield pipe


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """CPU seconds of each call of a copy kernel."""
    took: list[float] = []

    def clocked(kernel: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            start = time.thread_time()
            kernel(*args, **options)
            took.append(time.thread_time() - start)

        return run

    for name in ("gather_frames", "scatter_frames"):
        monkeypatch.setattr(paged_copy_cpu, name, clocked(getattr(paged_copy_cpu, name)))
    return took


@pytest.mark.parametrize("chunks", [1, 4, 16])
def test_runner(
    chunks: int, engine: Engine, kernels: list[float], benchmark: BenchmarkFixture
) -> None:
    with tierloom.open(RUNNER, layout=engine.layout, model="bench") as pipe:
        tokens, slots = engine.prompt()[: chunks * BLOCK], engine.source[: chunks * BLOCK]
        run = lambda _: pipe.store(tokens, engine.caches, slots).wait()  # noqa: E731
        per_chunk(benchmark, run, lambda: None, chunks, len(tokens), kernels)


@pytest.mark.parametrize("chunks", [1, 4, 16])
def test_store(
    chunks: int, engine: Engine, pipe: Pipeline, kernels: list[float], benchmark: BenchmarkFixture
) -> None:
    slots = engine.source[: chunks * CHUNK]
    run = lambda tokens: pipe.store(tokens, engine.caches, slots).wait()  # noqa: E731
    prepare = lambda: engine.prompt()[: len(slots)]  # noqa: E731
    per_chunk(benchmark, run, prepare, chunks, len(slots), kernels)


@pytest.mark.parametrize("chunks", [1, 4, 16])
def test_retrieve(
    chunks: int, engine: Engine, pipe: Pipeline, kernels: list[float], benchmark: BenchmarkFixture
) -> None:
    tokens = kept(engine, pipe)[: chunks * CHUNK]
    slots = engine.target[: len(tokens)]
    run = lambda _: pipe.retrieve(tokens, engine.caches, slots).wait()  # noqa: E731
    per_chunk(benchmark, run, lambda: None, chunks, len(tokens), kernels)


@pytest.mark.parametrize("chunks", [1, 16])
def test_lookup(
    chunks: int, engine: Engine, pipe: Pipeline, kernels: list[float], benchmark: BenchmarkFixture
) -> None:
    tokens = kept(engine, pipe)[: chunks * CHUNK]
    run = lambda _: pipe.lookup(tokens)  # noqa: E731
    per_chunk(benchmark, run, lambda: None, chunks, len(tokens), kernels)


def kept(engine: Engine, pipe: Pipeline) -> np.ndarray:
    """A prompt that is stored, and comes back as it was."""
    tokens = engine.prompt()
    pipe.store(tokens, engine.caches, engine.source).wait()
    engine.blank()
    assert pipe.retrieve(tokens, engine.caches, engine.target).wait().tokens == len(tokens)
    assert engine.same()
    return tokens


def per_chunk(
    benchmark: BenchmarkFixture, run: Callable[[Any], Any], prepare: Callable[[], Any],
    chunks: int, tokens: int, kernels: list[float],
) -> None:  # fmt: skip
    """`CALLS` requests, one after another, per round."""
    took: list[Took] = []
    copies: list[float] = []

    def setup() -> tuple[tuple[list[Any]], dict[str, Any]]:
        kernels.clear()
        return ([prepare() for _ in range(CALLS)],), {}

    def calls(arguments: list[Any]) -> None:
        def all_of_them() -> None:
            for argument in arguments:
                result = run(argument)
                done = getattr(result, "tokens", result)
                if done != tokens or getattr(result, "lost", {}):
                    raise RuntimeError(f"{tokens} tokens were asked: {result}")

        took.append(timed(all_of_them))
        copies.append(sum(kernels))

    for _ in range(3):
        calls(setup()[0][0])
    idle()
    took.clear()
    copies.clear()
    benchmark.group = "graph"
    benchmark.pedantic(calls, setup=setup, rounds=ROUNDS, iterations=1)
    each = 1e6 / CALLS / chunks
    python = [(t.cpu - c) * each for t, c in zip(took, copies, strict=True)]
    benchmark.extra_info.update(
        us_per_chunk=round(statistics.median(python), 2),
        us_per_chunk_best=round(min(python), 2),
        us_kernels=round(statistics.median(copies) * each, 2),
        us_wall_per_request=round(statistics.median(t.wall for t in took) / CALLS * 1e6, 1),
    )
