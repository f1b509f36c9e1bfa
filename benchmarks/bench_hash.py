"""Naming the chunks of a long prompt: sha256 over grains, each with the link before it.

    python -m pytest benchmarks/bench_hash.py --benchmark-only

`m_tokens_per_s` is wall time, `m_tokens_per_cpu_s` CPU time; `of_sha256` stands beside one sha256
over the packed tokens, the least that naming them could cost.
"""

from __future__ import annotations

import statistics
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
import pytest
from yardstick import Took, timed

from tierloom.stages.kv.prefix import grain_links

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

TOKENS, ROUNDS = 131_072, 15


@pytest.mark.parametrize("grain", [256, 32])
def test_hash(grain: int, benchmark: BenchmarkFixture) -> None:
    tokens = np.random.default_rng(0).integers(0, 128_000, TOKENS).astype(np.int32)
    seed = sha256(b"bench").digest()
    first = sha256(seed + tokens[:grain].astype("<i4").tobytes()).digest()
    links = grain_links(seed, tokens, grain)
    assert (links[0], len(links)) == (first, TOKENS // grain)
    took: list[Took] = []
    floor: list[Took] = []

    def setup() -> None:
        floor.append(timed(lambda: sha256(tokens.tobytes()).digest()))

    benchmark.group = "hash"
    benchmark.pedantic(
        lambda: took.append(timed(lambda: grain_links(seed, tokens, grain))),
        setup=setup, rounds=ROUNDS, iterations=1,
    )  # fmt: skip
    wall = statistics.median(t.wall for t in took)
    benchmark.extra_info.update(
        m_tokens_per_s=round(TOKENS / wall / 1e6, 1),
        m_tokens_per_s_best=round(TOKENS / min(t.wall for t in took) / 1e6, 1),
        m_tokens_per_cpu_s=round(TOKENS / statistics.median(t.cpu for t in took) / 1e6, 1),
        of_sha256=round(statistics.median(t.wall for t in floor) / wall, 3),
    )
