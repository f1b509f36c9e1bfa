"""Finding kept text anywhere: an index of 10^6 chunks of 256 tokens, 8 x 10^6 grains; one thread.

    python -m pytest benchmarks/bench_text_index.py --benchmark-only

`find`: 32,768 tokens, of which `half` are kept, `nothing` is, or all are one token, kept and asked
(`worst`). Runs that miss kept text, or tokens that no chunk has, would be wrong.
`churn`: chunks come and go one for one, a chunk being 9 entries of the table, until as many entries
went as are said; then the same lookups again. `longest_ms` is the dearest single `add` of all, in
CPU time: of many millions some are interrupted.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest
from yardstick import Took, timed

from tierloom.stages.directory.text_index import TextIndex
from tierloom.stages.kv.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

CHUNKS, CHUNK, GRAIN, ASKED, ROUNDS = 1_000_000, 256, 32, 32_768, 15
EVICTED = 10_000_000
ROOT = b"r" * 32


@dataclass
class Kept:
    """An index, and what each step of filling it took."""

    index: TextIndex = field(default_factory=lambda: TextIndex(CHUNK, GRAIN))
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))
    came: int = 0
    went: int = 0
    nbytes: int = 0
    adding: float = 0.0
    removing: float = 0.0
    longest: float = 0.0

    def some(self, n: int) -> Iterator[tuple[bytes, Text]]:
        ids = self.rng.integers(0, 128_000, (n, CHUNK)).astype(np.int32)
        for row in ids:
            yield key(self.came), Text(row, CHUNK, ROOT, ROOT, ROOT)
            self.came += 1

    def add(self, n: int) -> None:
        for name, text in self.some(n):
            began = time.thread_time()
            self.index.add(name, text)
            took = time.thread_time() - began
            self.adding, self.longest = self.adding + took, max(self.longest, took)

    def remove(self, n: int) -> None:
        names = [key(i) for i in range(self.went, self.went + n)]
        began = time.thread_time()
        for name in names:
            self.index.remove(name)
        self.removing += time.thread_time() - began
        self.went += n

    def half(self) -> tuple[np.ndarray, int]:
        """A prompt, half of it from anywhere in kept chunks; and how much must be found."""
        prompt, found = self.rng.integers(0, 128_000, ASKED).astype(np.int32), 0
        for i, (name, text) in enumerate(self.some(ASKED // CHUNK // 2 + 16)):
            self.index.add(name, text)
            cut, at = int(self.rng.integers(0, 64)), i * ASKED // 80
            prompt[at : at + CHUNK - cut] = text.ids[cut:]
            found += CHUNK - -(-cut // GRAIN) * GRAIN
        return prompt, found


def key(i: int) -> bytes:
    return i.to_bytes(8, "little") * 4


@pytest.fixture(scope="module")
def kept() -> Kept:
    made = Kept()
    made.index.warm_up()
    for _ in range(CHUNKS // 10_000):
        made.add(10_000)
    made.nbytes = made.index.nbytes
    return made


def asked(kept: Kept, what: str) -> tuple[np.ndarray, int]:
    if what == "half":
        return kept.half()
    if what == "nothing":
        return kept.rng.integers(0, 128_000, ASKED).astype(np.int32), 0
    same = np.full(ASKED, 7, np.int32)
    for prompt in range(3):
        parent = ROOT
        for at in range(0, ASKED, CHUNK):
            name = b"%8d%24d" % (prompt, at)
            kept.index.add(name, Text(same[:CHUNK], at, ROOT, parent, ROOT))
            parent = name
    return same, ASKED - 2 * CHUNK


@pytest.mark.timeout(240)
@pytest.mark.parametrize("what", ["half", "nothing", "worst"])
def test_find(kept: Kept, what: str, benchmark: BenchmarkFixture) -> None:
    find(kept, what, benchmark)


@pytest.mark.timeout(240)
def test_index_memory_and_changes(kept: Kept, benchmark: BenchmarkFixture) -> None:
    n = EVICTED // (CHUNK // GRAIN + 1) + 1
    fill = kept.adding

    def churn() -> None:
        for _ in range(0, n, 10_000):
            kept.remove(10_000)
            kept.add(10_000)

    benchmark.group = "text index"
    benchmark.pedantic(churn, rounds=1, iterations=1)
    benchmark.extra_info.update(
        index_mb=round(kept.nbytes / 1e6, 1),
        adds_per_s=round(CHUNKS / fill),
        removes_per_s=round(kept.went / kept.removing),
        longest_ms=round(1e3 * kept.longest, 2),
        entries_evicted=kept.went * (CHUNK // GRAIN + 1),
    )


@pytest.mark.timeout(240)
@pytest.mark.parametrize("what", ["half", "nothing", "worst"])
def test_find_after_churn(kept: Kept, what: str, benchmark: BenchmarkFixture) -> None:
    find(kept, what, benchmark)


def find(kept: Kept, what: str, benchmark: BenchmarkFixture) -> None:
    prompt, least = asked(kept, what)
    runs = kept.index.find(prompt, ROOT)
    tokens = sum(run.end - run.start for run in runs)
    assert tokens >= least if least else not runs, (tokens, least)
    took: list[Took] = []
    benchmark.group = "text index"
    benchmark.pedantic(
        lambda: took.append(timed(lambda: kept.index.find(prompt, ROOT))),
        rounds=ROUNDS, iterations=1,
    )  # fmt: skip
    benchmark.extra_info.update(
        ms=round(1e3 * statistics.median(t.wall for t in took), 2),
        ms_best=round(1e3 * min(t.wall for t in took), 2),
        cpu_ms=round(1e3 * statistics.median(t.cpu for t in took), 2),
        tokens=tokens,
    )
