"""Many threads that give up: every codec, memory trusted or not, each byte that comes compared.

A slice of it in each run of the suite; TIERLOOM_STRESS=100000 has so many operations in all.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import Engine, settle
from test_every_codec import LOSS, encoded

from tierloom import Lost
from tierloom.pipeline.run.threads import Pool
from tierloom.stages.ops.get import Get
from tierloom.stages.ops.scan_budget import ScanBudget

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Open

    from tierloom import Pipeline

OPERATIONS = int(os.environ.get("TIERLOOM_STRESS", "1500"))
THREADS = 8
TOKENS, FORKS = 320, (0, 160, 272)
"""Prompts of five chunks; of each family one leaves another in the middle of a chunk."""
USES = ["plain", *LOSS]
KINDS = [(use, verify) for use in USES for verify in ("always", "remote")]


def prompts() -> list[np.ndarray]:
    made = []
    for family in range(4):
        first = np.random.default_rng(family).integers(0, 50_000, TOKENS).astype(np.int32)
        for fork in FORKS:
            ids = first.copy()
            if fork:
                ids[fork:] = np.random.default_rng(100 * family + fork).integers(
                    0, 50_000, TOKENS - fork
                )
            made.append(ids)
    return made


def shared(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens before the first in which two prompts differ."""
    differ = np.flatnonzero(a != b)
    return int(differ[0]) if len(differ) else len(a)


class World:
    """KV that follows from the tokens before it, as a model's does, and what may come of it."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.prompts = engine, prompts()
        self.kv = [self._computed(ids) for ids in self.prompts]
        self.also: list[list[tuple[int, list[np.ndarray]]]] = [[] for _ in self.prompts]
        """What else is right for the first so many tokens: as a codec gives it back."""

    def _computed(self, ids: np.ndarray) -> list[np.ndarray]:
        """[2, tokens, heads x dim] of each layer, as 16-bit words."""
        e, past = self.engine, np.cumsum(ids.astype(np.int64) * 2654435761 % 1000003) % 65521
        rows = torch.from_numpy(past)[:, None, None]
        at = torch.arange(e.heads)[:, None] * 977 + torch.arange(e.dim) * 131
        made = []
        for layer in range(e.layers):
            k = (rows * (31 + layer) + at) % 4093
            v = (k * 7 + layer) % 4091
            both = torch.stack([k, v]).float().div(512).sub(4).to(torch.bfloat16)
            made.append(both.flatten(2).view(torch.int16).numpy())
        return made

    def fill(self, caches: list[torch.Tensor], slots: np.ndarray, k: int) -> None:
        for cache, rows in zip(caches, self.kv[k], strict=True):
            flat(cache)[:, slots] = rows

    def right(self, k: int, layer: int, rows: np.ndarray) -> bool:
        """Whether these are the first rows of a prompt's layer, each as something gave it back."""
        n = rows.shape[1]
        good = (rows == self.kv[k][layer][:, :n]).all((0, 2))
        for upto, other in self.also[k]:
            if good.all():
                break
            m = min(n, upto)
            good[:m] |= (rows[:, :m] == other[layer][:, :m]).all((0, 2))
        return bool(good.all())


def flat(cache: torch.Tensor) -> np.ndarray:
    """[2, slots, heads x dim] as 16-bit words; by numpy, whose threads do not wait for cores."""
    return cache.view(torch.int16).numpy().reshape(2, -1, cache.shape[-2] * cache.shape[-1])


def learn(world: World, pipe: Pipeline, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the codec gives back of each prompt, scan by scan, while nothing else goes on."""
    engine, slots = world.engine, np.arange(TOKENS)
    finer, level = Get._finer, [1, 1]

    async def counted(self: Any, *args: Any) -> None:
        level[1] = level[0]
        await finer(self, *args)

    def enough(self: ScanBudget, *args: Any) -> bool:
        level[1] -= 1
        return level[1] > 0

    with monkeypatch.context() as patch:
        patch.setattr(Get, "_finer", counted)
        patch.setattr(ScanBudget, "finer", enough)
        for k, ids in enumerate(world.prompts):
            pipe.clear()
            world.fill(engine.caches, slots, k)
            assert pipe.store(ids, engine.caches, slots).wait().tokens == TOKENS
            settle(pipe)
            for scans in (1, 2, 3) if use == "progressive" else (1,):
                level[0] = scans
                pipe._portal.call(pipe.tiers["hot"].clear)
                target = engine.blank()
                assert pipe.retrieve(ids, target.caches, slots).wait().tokens == TOKENS
                settle(pipe)
                came = [flat(cache)[:, slots] for cache in target.caches]
                for other, those in enumerate(world.prompts):
                    if n := shared(ids, those):
                        world.also[other].append((n, came))
    pipe.clear()


def dawdle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are late now and then, as on a machine that others use: what was given up meanwhile
    is what they come to touch."""
    begin = Pool.__call__

    def late(self: Pool, fn: Any, *args: Any, **named: Any) -> Any:
        def run(*args: Any) -> Any:
            if random.random() < 0.05:
                time.sleep(random.uniform(0, 0.01))
            return fn(*args)

        return begin(self, run, *args, **named)

    monkeypatch.setattr(Pool, "__call__", late)


class Caller:
    """A thread's own cache, and what it does with it at random."""

    def __init__(self, world: World, pipe: Pipeline, seed: int, count: int) -> None:
        self.world, self.pipe, self.count = world, pipe, count
        self.chance = random.Random(seed)
        self.caches = world.engine.blank().caches
        self.slots = np.random.default_rng(seed).permutation(TOKENS)
        self.seen: Counter[str] = Counter()
        self.usual = {"store": 0.05, "retrieve": 0.02}
        """Seconds that a request takes, of late."""
        self.wrong: list[str] = []

    def __call__(self) -> None:
        try:
            for _ in range(self.count):
                self.seen["operations"] += 1
                self._one(self.chance.randrange(len(self.world.prompts)), self.chance.random())
        except Exception as error:
            self.wrong.append(repr(error))

    def _one(self, k: int, what: float) -> None:
        ids = self.world.prompts[k]
        if what < 0.4:
            self._store(k)
        elif what < 0.94:
            self._retrieve(k)
        elif what < 0.96:
            self.pipe.pin(ids)
            self.pipe.pin(ids, pinned=False)
        elif what < 0.97:
            self.pipe.clear()
        else:
            self.pipe.lookup(ids)

    def _gives_up(self, ticket: Any) -> bool:
        """At any moment of its life, as long as such a request usually lives."""
        if self.chance.random() > 0.3:
            return False
        self.seen["given up"] += 1
        time.sleep(self.chance.uniform(0, self.usual[ticket._request.graph]))
        ticket.cancel()
        return True

    def _store(self, k: int) -> None:
        ids, layers = self.world.prompts[k], self.world.engine.layers
        self.world.fill(self.caches, self.slots, k)
        if self.chance.random() < 0.5:
            ticket = self.pipe.store(ids, self.caches, self.slots)
        else:
            ticket = self.pipe.begin_store(ids, self.caches, self.slots)
            all_of_it = self.chance.random() < 0.8
            for layer in range(layers if all_of_it else self.chance.randrange(layers)):
                ticket.layer_done(layer)
        if not self._gives_up(ticket) and self.chance.random() < 0.3:
            self._lived(ticket, ticket.wait())
        ticket.captured(self.chance.uniform(0, 0.2))
        for cache in self.caches:  # the memory is the caller's again
            flat(cache)[:] = self.chance.randrange(1 << 15)
        self._learn(ticket._request.receipt())

    def _retrieve(self, k: int) -> None:
        ids, world = self.world.prompts[k], self.world
        for cache in self.caches:
            flat(cache)[:] = 0
        if self.chance.random() < 0.5:
            ticket = self.pipe.retrieve(ids, self.caches, self.slots)
            given_up = self._gives_up(ticket)
            n = ticket.wait().tokens
            if not given_up:
                self._lived(ticket, ticket._request.receipt())
        else:
            ticket, n = self.pipe.begin_retrieve(ids, self.caches, self.slots), TOKENS
            for layer in range(world.engine.layers):
                n = min(n, ticket.wait_layer(layer))
                if not world.right(k, layer, flat(self.caches[layer])[:, self.slots[:n]]):
                    self.wrong.append(f"prompt {k}, layer {layer} as it came")
            n = min(n, ticket.wait().tokens)
        receipt = ticket._request.receipt()
        self._learn(receipt)
        self.seen["tokens"] += n
        came = [flat(cache)[:, self.slots[:n]] for cache in self.caches]
        if not all(world.right(k, layer, rows) for layer, rows in enumerate(came)):
            self.wrong.append(f"prompt {k}: {receipt}")
        before = [flat(cache).copy() for cache in self.caches]
        time.sleep(0.001)
        if not all(np.array_equal(a, flat(b)) for a, b in zip(before, self.caches, strict=True)):
            self.wrong.append(f"prompt {k}: written after it was waited for")

    def _lived(self, ticket: Any, receipt: Any) -> None:
        self.usual[ticket._request.graph] += (
            receipt.seconds - self.usual[ticket._request.graph]
        ) / 4

    def _learn(self, receipt: Any) -> None:
        """Nothing here is damaged, and no stage may break."""
        self.wrong += [
            f"{code.name}" for code in (Lost.CORRUPT, Lost.BROKEN) if code in receipt.lost
        ]


@pytest.mark.slow
@pytest.mark.parametrize(("use", "verify"), KINDS)
def test_stress(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, verify: str
) -> None:
    monkeypatch.setenv("TIERLOOM_COPYING", str(THREADS))
    engine = Engine(dim=32)
    number = KINDS.index((use, verify))
    source = encoded(
        tmp_path, *([] if use == "plain" else [use]), verify=verify, budget__arena="12 MiB",
        budget__inflight=64, tiers__hot__capacity="1 MiB", tiers__hot__evict="s3-fifo",
        graphs__store__pace={"by": "layer", "window": 2},
        graphs__retrieve__pace={"by": "layer", "window": 2},
        graphs__store__deadline="10 s", graphs__retrieve__deadline="10 s",
    )  # fmt: skip
    if number % 4 < 2:  # as every other codec
        source["tiers"]["warm"] = {
            "use": "files", "path": str(tmp_path / "files"), "capacity": "3 MiB",
        }  # fmt: skip
    else:
        source["tiers"]["warm"] |= {"capacity": "3 MiB", "segment": "1 MiB", "keep_free": 0}
    world, pipe = World(engine), opened(source, engine)
    if LOSS.get(use):
        learn(world, pipe, use, monkeypatch)
    dawdle(monkeypatch)
    callers = [
        Caller(world, pipe, seed, -(-OPERATIONS // len(KINDS) // THREADS))
        for seed in range(THREADS)
    ]
    threads = [threading.Thread(target=caller, daemon=True) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settle(pipe)
    seen = sum((caller.seen for caller in callers), Counter())
    print(f"\n{use}, verify: {verify}: {dict(seen)}")
    assert not [wrong for caller in callers for wrong in caller.wrong]
    assert seen["tokens"], "nothing ever came"
    figures = pipe.stats()
    assert not any(graph["degraded"] for graph in figures["graphs"].values())
    assert not sum(tier["corrupt"] for tier in figures["tiers"].values())
    pipe.arena.check()  # type: ignore[attr-defined]
