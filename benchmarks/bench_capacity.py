"""How much of a tier's capacity holds objects once it is full. No timing: `extra_info` alone.

    python -m pytest benchmarks/bench_capacity.py --benchmark-only

`equal`: prompts of whole chunks. `mixed`: prompts of 17 to 1,500 tokens, most of whose objects are
tails of some length of their own. Three times the capacity is stored, then as much again, during
which `resident` (bytes of objects / capacity) is looked at after each prompt; `resident_least` is
the worst of those. `payload` leaves headers and padding out of what is held.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cases import BLOCK, Engine, Shape, opened

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

SHAPE = Shape(8, 1, 32, group=4)  # 256 KiB per chunk: to 64 MiB as Llama's 32 MiB to 8 GiB
CAPACITY = 64 << 20
LONGEST = 1500


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sizes", ["equal", "mixed"])
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_capacity(tier: str, sizes: str, benchmark: BenchmarkFixture) -> None:
    engine = Engine(SHAPE, -(-LONGEST // BLOCK) * BLOCK)
    rng = np.random.default_rng(1)
    held: list[float] = []
    payload: list[float] = []

    def fill() -> None:
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path(__file__).parent) as folder:
            warm = {"use": "disk", "path": folder, "segment": "16 MiB", "keep_free": "1 MiB"}
            kept = {"use": "memory"} if tier == "memory" else warm
            tiers = {"only": {**kept, "capacity": CAPACITY}}
            with opened(engine, tiers, budget={"arena": "16 MiB"}) as pipe:
                stored = 0
                while stored < 6 * CAPACITY:
                    tokens = 1024 if sizes == "equal" else int(rng.integers(17, LONGEST))
                    ids = rng.integers(0, 128_000, tokens).astype(np.int32)
                    receipt = pipe.store(ids, engine.caches, engine.source[:tokens]).wait()
                    assert (receipt.tokens, receipt.lost) == (tokens, {}), receipt
                    stored += receipt.nbytes
                    if stored > 3 * CAPACITY:
                        stat = pipe.tiers["only"].stat()
                        held.append(stat.nbytes / CAPACITY)
                        payload.append((stat.nbytes - 4096 * stat.objects) / CAPACITY)

    benchmark.group = "capacity"
    benchmark.pedantic(fill, rounds=1, iterations=1)
    benchmark.extra_info.update(
        resident=round(statistics.mean(held), 4),
        resident_least=round(min(held), 4),
        payload=round(statistics.mean(payload), 4),
    )
