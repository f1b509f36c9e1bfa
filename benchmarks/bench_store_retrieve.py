"""Store and retrieve through the public API: 4,096 tokens out of a paged cache and back into it.

    python -m pytest benchmarks/bench_store_retrieve.py --benchmark-only

Every store is of new tokens, at steady state: the tier is full and evicts as much as comes, so that
no figure is of pages or blocks that are touched for the first time. An operation counts when its
receipt says that all of it was done and the bytes that came back are those that were stored;
otherwise the benchmark fails, and there is no figure.

`disk` is a pipeline whose only tier is a disk behind O_DIRECT; `tiered` stores into memory and
disk, and retrieves from the disk with memory emptied, promoting what comes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cases import CHUNK, SHAPES, Engine, clear, opened
from yardstick import Memcpy, RawDisk, idle, measure

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from pytest_benchmark.fixture import BenchmarkFixture

    from tierloom import Pipeline, Receipt, Ticket

pytestmark = pytest.mark.timeout(300)

TOKENS = 4096
KEPT = 3
"""Prompts that fit into a tier."""
ROUNDS = {"memory": 9, "disk": 5, "files": 5, "tiered": 5}


@pytest.fixture(scope="module", params=list(SHAPES))
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(SHAPES[request.param], TOKENS)


@pytest.fixture
def folder() -> Iterator[Path]:
    """On the disk of this checkout: /tmp may be memory."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path(__file__).parent) as made:
        yield Path(made)


@pytest.fixture(params=list(ROUNDS))
def tier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipe(tier: str, engine: Engine, folder: Path) -> Iterator[Pipeline]:
    capacity = KEPT * engine.shape.objects(TOKENS)
    hot = {"use": "memory", "capacity": capacity}
    warm = {
        "use": "disk", "path": str(folder / "disk"), "capacity": capacity, "segment": "512 MiB",
        "direct": True,
    }  # fmt: skip
    spare = capacity // KEPT  # pruning frees a sixteenth more than is needed
    cold = {"use": "files", "path": str(folder / "files"), "capacity": capacity + spare}
    tiers: dict[str, dict[str, dict[str, Any]]] = {
        "memory": {"hot": hot}, "disk": {"warm": warm}, "files": {"cold": cold},
        "tiered": {"hot": hot, "warm": warm},
    }  # fmt: skip
    with opened(engine, tiers[tier]) as pipe:
        for _ in range(KEPT + 2):  # fills the tiers, and touches every page that will be used
            store(pipe, engine, engine.prompt()).wait()
        idle()
        yield pipe


@pytest.fixture
def disk(tier: str, engine: Engine, folder: Path) -> Iterator[RawDisk | None]:
    """The disk's own rate, for tiers that are bound by it."""
    if tier not in ("disk", "tiered"):
        yield None
        return
    raw = RawDisk(folder, engine.nbytes)
    yield raw
    raw.close()


def test_store(
    tier: str, engine: Engine, pipe: Pipeline, disk: RawDisk | None, memcpy: Memcpy,
    benchmark: BenchmarkFixture,
) -> None:  # fmt: skip
    label(benchmark, "store", engine)
    stored = engine.prompt()
    confirm(pipe, engine, store(pipe, engine, stored).wait())
    verify(pipe, engine, stored)
    measure(
        benchmark,
        lambda tokens: store(pipe, engine, tokens).wait(),
        prepare=engine.prompt,
        check=lambda receipt: confirm(pipe, engine, receipt),
        nbytes=engine.nbytes, rounds=ROUNDS[tier], memcpy=memcpy,
        disk=disk.write if disk is not None else None,
    )  # fmt: skip


def test_retrieve(
    tier: str, engine: Engine, pipe: Pipeline, disk: RawDisk | None, memcpy: Memcpy,
    benchmark: BenchmarkFixture,
) -> None:  # fmt: skip
    label(benchmark, "retrieve", engine)
    kept = [engine.prompt() for _ in range(KEPT)]
    for tokens in kept:
        store(pipe, engine, tokens).wait()
    turn = 0

    def prepare() -> np.ndarray:
        nonlocal turn
        turn += 1
        if tier == "tiered":
            clear(pipe, "hot")
        return kept[turn % KEPT]

    def check(receipt: Receipt) -> None:
        came = {name: n for name, n in receipt.tiers.items() if name != "hot" or tier == "memory"}
        assert (receipt.tokens, receipt.lost) == (TOKENS, {}), receipt
        assert sum(came.values()) == TOKENS // CHUNK, receipt

    verify(pipe, engine, prepare())
    measure(
        benchmark,
        lambda tokens: retrieve(pipe, engine, tokens).wait(),
        prepare=prepare, check=check,
        nbytes=engine.nbytes, rounds=ROUNDS[tier], memcpy=memcpy,
        disk=disk.read if disk is not None else None,
    )  # fmt: skip


def label(benchmark: BenchmarkFixture, what: str, engine: Engine) -> None:
    model = next(name for name, shape in SHAPES.items() if shape is engine.shape)
    benchmark.group = f"{what} {model}"


def store(pipe: Pipeline, engine: Engine, tokens: np.ndarray) -> Ticket:
    return pipe.store(tokens, engine.caches, engine.source)


def retrieve(pipe: Pipeline, engine: Engine, tokens: np.ndarray) -> Ticket:
    return pipe.retrieve(tokens, engine.caches, engine.target)


def confirm(pipe: Pipeline, engine: Engine, receipt: Receipt) -> None:
    """All of the prompt was newly stored, in every tier."""
    each = dict.fromkeys(pipe.tiers, TOKENS // CHUNK)
    done = (receipt.tokens, receipt.nbytes, receipt.lost, receipt.tiers)
    assert done == (TOKENS, engine.nbytes, {}, each), receipt


def verify(pipe: Pipeline, engine: Engine, tokens: np.ndarray) -> None:
    """Every byte comes back as it was."""
    engine.blank()
    assert not engine.same()
    receipt = retrieve(pipe, engine, tokens).wait()
    assert (receipt.tokens, receipt.lost) == (TOKENS, {}), receipt
    assert engine.same(), "the bytes that came back are not those that were stored"
