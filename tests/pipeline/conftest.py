"""An engine of plain tensors, and pipelines over it whose leases are counted at the end."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import tierloom
from tierloom import KVLayout, Pipeline

if TYPE_CHECKING:
    from stores import Store

    from tierloom.testing import PoisonArena

sys.path.insert(0, str(Path(__file__).parent))

SHAPES = {
    "2BNHD": lambda b, n, h, d: (2, b, n, h, d),
    "B2NHD": lambda b, n, h, d: (b, 2, n, h, d),
    "2BHND": lambda b, n, h, d: (2, b, h, n, d),
    "B2HND": lambda b, n, h, d: (b, 2, h, n, d),
    "BNHD": lambda b, n, h, d: (b, n, h, d),
    "BHND": lambda b, n, h, d: (b, h, n, d),
    "SHD": lambda b, n, h, d: (b * n, h, d),
    "BND": lambda b, n, h, d: (b, n, h * d),
    "BHNC": lambda b, n, h, d: (b, h, n, 2 * d),
    "BHNC-KT": lambda b, n, h, d: (b, h, n, 2 * d),
}


class Engine:
    """Caches of one order, filled with noise, and the blocks of requests."""

    def __init__(
        self,
        order: str = "2BNHD",
        *,
        layers: int = 6,
        blocks: int = 40,
        block: int = 16,
        heads: int = 2,
        dim: int = 8,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        self.order, self.block, self.blocks = order, block, blocks
        self.heads, self.dim, self.layers = heads, dim, layers
        self._rng = np.random.default_rng(seed)
        self._make = torch.Generator().manual_seed(seed)
        shape = SHAPES[order](blocks, block, heads, dim)
        pair = order in ("BNHD", "BHND", "SHD")

        def one() -> torch.Tensor:
            return torch.randn(shape, generator=self._make).to(dtype)

        self.caches: list[Any] = [(one(), one()) if pair else one() for _ in range(layers)]
        self.layout = KVLayout.from_tensors(
            self.caches, order=order, block_tokens=block if order == "SHD" else None
        )

    def slots(self, tokens: int) -> np.ndarray:
        """Token slots of shuffled blocks."""
        blocks = self._rng.permutation(self.blocks)[: -(-tokens // self.block)]
        return (blocks[:, None] * self.block + np.arange(self.block)).reshape(-1)[:tokens]

    def blank(self) -> Engine:
        """The same engine with 0xA5 in every byte."""
        other = copy.copy(self)
        other._rng = np.random.default_rng(1)
        other.caches = [
            tuple(map(blank, c)) if isinstance(c, tuple) else blank(c) for c in self.caches
        ]
        return other

    @property
    def flat(self) -> list[torch.Tensor]:
        return [t for c in self.caches for t in (c if isinstance(c, tuple) else (c,))]

    def rows(self, slots: np.ndarray) -> torch.Tensor:
        """[kv, layers, tokens, heads, dim] as bytes, by plain indexing."""
        from tierloom.stages.kv.layout_check import token

        return torch.stack(
            [
                torch.stack(
                    [
                        torch.stack([token(self.layout, c, kv, int(s)).contiguous() for s in slots])
                        for c in self.caches
                    ]
                )
                for kv in range(self.layout.kv)
            ]
        ).view(torch.uint8)

    def untouched(self, slots: np.ndarray) -> bool:
        """Nothing but `slots` was written (of a `blank` engine)."""
        mine = np.setdiff1d(np.arange(self.blocks * self.block), slots)
        return bool((self.rows(mine) == 0xA5).all()) if len(mine) else True


def blank(t: torch.Tensor) -> torch.Tensor:
    """By numpy: where cores are busy, torch's threads wait for one another."""
    raw = np.full(t.nbytes, 0xA5, np.uint8)
    return torch.from_numpy(raw).view(t.dtype).view(t.shape)


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, n).astype(np.int32)


MEMORY = {
    "version": 1,
    "name": "test",
    "chunk": {"tokens": 64, "grain": 16, "group": 2},
    "budget": {"arena": "4 MiB"},
    "tiers": {"hot": {"use": "memory", "capacity": "16 MiB"}},
    "graphs": {
        "store": {
            "stages": {
                "keys": {"use": "hash"},
                "fresh": {"use": "lookup", "want": "absent"},
                "pack": {"use": "gather"},
                "hot": {"use": "put", "tier": "hot"},
            }
        },
        "retrieve": {
            "stages": {
                "keys": {"use": "hash"},
                "plan": {"use": "lookup"},
                "fetch": {"use": "get"},
                "grow": {"use": "decode"},
                "place": {"use": "scatter"},
            }
        },
    },
}


def config(**changes: Any) -> dict[str, Any]:
    """MEMORY with values replaced by dotted path, '__' standing for the dot."""
    made = copy.deepcopy(MEMORY)
    for path, value in changes.items():
        *parents, last = path.split("__")
        at: Any = made
        for name in parents:
            at = at.setdefault(name, {})
        at[last] = value
    return made


def with_disk(path: Path, **changes: Any) -> dict[str, Any]:
    """Memory over disk, written through."""
    made = config(
        tiers__warm={
            "use": "disk",
            "path": str(path),
            "capacity": "64 MiB",
            "segment": "16 MiB",
            "keep_free": "1 MiB",
        },
        **changes,
    )
    made["graphs"]["store"]["stages"]["warm"] = {"use": "put", "tier": "warm", "when_full": "block"}
    made["graphs"]["retrieve"]["stages"]["fetch"]["promote"] = "hot"
    return made


Open = Callable[..., Pipeline]


@pytest.fixture(autouse=True)
def over_poison(poisoned: list[PoisonArena]) -> list[PoisonArena]:
    """The whole folder runs over memory into which nobody may write late."""
    return poisoned


@pytest.fixture
def opened() -> Iterator[Open]:
    """Open pipelines; afterwards every lease is home, no request open, and no thread left."""
    pipes: list[Pipeline] = []

    def make(source: Any, engine: Engine, *, model: str = "test", **options: Any) -> Pipeline:
        pipe = tierloom.open(source, layout=engine.layout, model=model, **options)
        pipes.append(pipe)
        return pipe

    yield make
    for pipe in pipes:
        if not pipe._closed:
            settle(pipe)
            pipe.close()
        stuck = any(t.cls.__name__ == "Stuck" for t in pipe.spec.tiers.values())
        expelled = any(t.counts.corrupt for t in pipe.tiers.values())  # read once more, to be sure
        odd = stuck or expelled
        beyond: Any = 0 if odd else getattr(pipe.arena, "beyond", 0)
        assert beyond <= 0, f"{beyond} bytes were leased that nobody had promised"
        assert pipe.arena.leases == 0, "a lease did not come home"
        assert not pipe._portal.alive, "the portal is still running"


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Store]]:
    """Stores by kind, each started when a first test asks for it, and kept for the others."""
    from kinds import KINDS, OTHERS

    made: dict[str, Store] = {}

    def of(kind: str) -> Store:
        if kind not in made:
            made[kind] = (KINDS | OTHERS)[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    yield of
    for each in made.values():
        each.close()


@pytest.fixture
def store(request: pytest.FixtureRequest, running: Callable[[str], Store]) -> Store:
    return running(request.param)


@pytest.fixture
def over(
    store: Store, opened: Open, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Open:
    """Open pipelines over the store, which runs and holds nothing that this test would find."""
    from stores import AWS

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    # All but headers goes by NIXL, also of objects as small as these.
    monkeypatch.setattr("tierloom.stages.tiers.nixl.agent._SMALL", 4096)
    store.model = request.node.name
    store.ready()

    def make(engine: Engine, *, model: str = "", **options: Any) -> Pipeline:
        return opened(store.config(**options), engine, model=store.model + model)

    return make


def settle(pipe: Pipeline, seconds: float = 40.0) -> None:
    """Wait until nothing is under way; then only the memory tiers hold leases, and nobody waits.

    A client whose connection was cut may try again by itself, and holds its memory meanwhile.
    """
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        s = pipe.stats()
        if not any(g["open"] for g in s["graphs"].values()) and s["arena"]["flight"] == 0:
            break
        time.sleep(0.005)
    s = pipe.stats()
    assert not any(g["open"] for g in s["graphs"].values()), s["graphs"]
    assert s["arena"]["flight"] == 0, s["arena"]
    assert pipe.arena.promises.spare == pipe.arena.working
