"""Pipelines over real pools of memory: shared by processes, damaged, frozen, killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pools
import pytest
import torch
from conftest import Engine, config, settle, tokens
from pooled_cases import names_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Open

    from tierloom import Pipeline

IDS = tokens(192)


class Mooncake:
    """A pool, and how to do bad things to it."""

    def __init__(self, folder: Path) -> None:
        self.pool = pools.MooncakePool(folder)
        self.options = {"use": "mooncake", "url": self.pool.url, "deadline": "1 s"}
        self.frozen = [self.pool.master, *self.pool.owners]
        self.close = self.pool.close

    def restart(self) -> None:
        self.pool.close()
        self.pool.master.start()
        for owner in self.pool.owners:
            owner.start()

    def replace(self, tier: Any, name: str, value: bytes) -> None:
        tier._remove([name])
        with tier._in_use() as client:
            assert not value or client.put(tier._base + name, value) == 0


class InfiniStore:
    """A server, and how to do bad things to it."""

    def __init__(self, folder: Path) -> None:
        self.server = pools.InfiniServer(folder)
        self.options = {"use": "infinistore", "url": self.server.url, "deadline": "1 s"}
        self.frozen = [self.server]
        self.close = self.server.kill

    def restart(self) -> None:
        self.server.kill()
        self.server.start()

    def replace(self, tier: Any, name: str, value: bytes) -> None:
        with tier._link() as (link, base):
            link.remove(base + name)
            assert not value or link.put(base + name, value)


KINDS = [
    pytest.param((Mooncake, "mooncake"), id="mooncake"),
    pytest.param((InfiniStore, "infinistore"), id="infinistore", marks=pytest.mark.infinistore),
]


@pytest.fixture(scope="module", params=KINDS)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    make, part = request.param
    pools.require(part)
    made = make(tmp_path_factory.mktemp(part))
    yield made
    made.close()


def over(store: Any, **changes: Any) -> dict[str, Any]:
    """Memory over a pool, written through."""
    made = config(
        tiers__warm=store.options | {"timeout": "500 ms", "probe": "200 ms"},
        graphs__retrieve__deadline="1 s",
        graphs__retrieve__stages__fetch={"use": "get", "promote": "hot"},
        **changes,
    )
    made["graphs"]["store"]["stages"]["warm"] = {"use": "put", "tier": "warm", "when_full": "block"}
    return made


def cold(pipe: Pipeline) -> Pipeline:
    """Memory is empty: what comes now comes out of the pool."""
    pipe._portal.call(pipe.tiers["hot"].clear)
    return pipe


def never_wrong(pipe: Pipeline, engine: Engine, at: np.ndarray, layered: bool = False) -> int:
    """Retrieve; check what came; how many tokens."""
    target = engine.blank()
    begin = pipe.begin_retrieve if layered else pipe.retrieve
    ticket = begin(IDS, target.caches, at)
    for i in range(engine.layers if layered else 0):
        ticket.wait_layer(i)
    n = ticket.wait().tokens
    assert n == 0 or torch.equal(engine.rows(at[:n]), target.rows(at[:n])), "wrong bytes"
    settle(pipe)
    return n


def kept(pipe: Pipeline, engine: Engine, at: np.ndarray, seconds: float = 20.0) -> None:
    """Store until both tiers have taken it."""
    end = time.monotonic() + seconds
    while True:
        receipt = pipe.store(IDS, engine.caches, at).wait()
        settle(pipe)
        if not receipt.lost and never_wrong(cold(pipe), engine, at) == 192:
            return
        assert time.monotonic() < end, receipt
        time.sleep(0.1)


CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from conftest import Engine, tokens
import tierloom
engine = Engine()
with tierloom.open(json.loads(sys.argv[2]), layout=engine.layout, model="shared") as pipe:
    receipt = pipe.store(tokens(192), engine.caches, engine.slots(192)).wait()
    print(json.dumps([receipt.tokens, receipt.tiers, len(receipt.lost)]))
"""


def test_what_one_process_stores_another_retrieves(opened: Open, store: Any) -> None:
    engine = Engine()
    at = engine.slots(192)
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), json.dumps(over(store))]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    said = json.loads(shown.stdout.splitlines()[-1])
    assert said == [192, {"hot": 3, "warm": 3}, 0]
    for layered, pace in ((False, "request"), (True, "layer")):
        source = over(store, graphs__retrieve__pace={"by": pace})
        pipe = opened(source, engine, model="shared")
        assert never_wrong(pipe, engine, at, layered) == 192
        assert pipe.stats()["tiers"]["warm"]["hits"] == 3
    assert never_wrong(opened(over(store), engine, model="another"), engine, at) == 0


@pytest.mark.parametrize("kind", ["flip", "zero", "swap", "cut"])
@pytest.mark.parametrize("layered", [False, True], ids=["whole", "layered"])
def test_damage_in_the_pool(opened: Open, store: Any, kind: str, layered: bool) -> None:
    engine = Engine()
    at = engine.slots(192)
    rng = np.random.default_rng(11)
    source = over(store, graphs__retrieve__pace={"by": "layer" if layered else "request"})
    pipe = opened(source, engine, model=f"{kind} {layered}")
    tier: Any = pipe.tiers["warm"].tier
    misses = 0
    for _ in range(5):
        kept(pipe, engine, at)
        entries = pipe.tiers["hot"].tier._index._entries.values()  # type: ignore[attr-defined]
        keys = [e.place.header.key for e in entries]
        one, two = (keys[int(k)] for k in rng.choice(len(keys), 2, replace=False))
        piece = int(rng.integers(len(names_of(tier, one))))
        mine, yours = names_of(tier, one)[piece], names_of(tier, two)[piece]
        a, b = (bytearray(value) for value in tier._peek([mine, yours]))
        where = int(rng.integers(len(a)))
        if kind == "flip":
            a[where] ^= 1 << int(rng.integers(8))
        elif kind == "zero":
            a = a[: where // 4096 * 4096] + bytes(4096) + a[where // 4096 * 4096 + 4096 :]
        elif kind == "swap":
            a, b = b, a
            store.replace(tier, yours, bytes(b))
        else:
            del a[where:]
        store.replace(tier, mine, bytes(a))
        misses += never_wrong(cold(pipe), engine, at, layered) < 192
    assert misses, "the damage never hit anything"


def test_a_frozen_pool_costs_misses_and_no_more(opened: Open, store: Any) -> None:
    """What memory has acknowledged stays; nothing waits longer than its deadline."""
    engine = Engine()
    at = engine.slots(192)
    for victim in store.frozen:
        pipe = opened(over(store), engine, model="frozen")
        kept(pipe, engine, at)
        victim.pause()
        try:
            cold(pipe)
            for _ in range(5):
                target = engine.blank()
                ticket = pipe.retrieve(IDS, target.caches, at)
                n = ticket.wait().tokens
                assert time.monotonic() < ticket.deadline + 5  # room for a loaded machine
                assert n == 0 or torch.equal(engine.rows(at[:n]), target.rows(at[:n]))
            other = tokens(192, seed=9)
            assert pipe.store(other, engine.caches, at).wait().tiers.get("hot") == 3
            assert pipe.lookup(other) == 192
            running = pipe.tiers["warm"].tier._calls._running
            assert len(running) <= 2
        finally:
            victim.resume()
        kept(pipe, engine, at)
        settle(pipe)
        pipe.close()


def test_a_pool_that_dies_and_comes_back_empty(opened: Open, store: Any) -> None:
    engine = Engine()
    at = engine.slots(192)
    pipe = opened(over(store), engine, model="died")
    kept(pipe, engine, at)
    store.restart()
    assert never_wrong(pipe, engine, at) == 192, "memory has it still"
    n = never_wrong(cold(pipe), engine, at)
    assert n == 0
    kept(pipe, engine, at)


def test_requests_given_up_at_random(opened: Open, store: Any) -> None:
    """Never a wrong byte, and every lease comes home."""
    rng = np.random.default_rng(3)
    engine = Engine(blocks=80)
    pace = {"by": "layer", "window": 1}
    pipe = opened(over(store, graphs__retrieve__pace=pace), engine, model="torture")
    prompts = [tokens(int(rng.integers(60, 400)), seed=s) for s in range(6)]
    slots = [engine.slots(len(p)) for p in prompts]
    truth = [engine.rows(s) for s in slots]
    came = 0
    for _ in range(50):
        k = int(rng.integers(len(prompts)))
        ids, at = prompts[k], slots[k]
        if rng.random() < 0.4:
            ticket = pipe.store(ids, engine.caches, at)
            ticket.cancel() if rng.random() < 0.4 else ticket.wait(0.5)
            continue
        if rng.random() < 0.7:
            cold(pipe)
        target = engine.blank()
        wave = pipe.begin_retrieve(ids, target.caches, at)
        going = rng.random() < 0.5
        for i in range(engine.layers if going else int(rng.integers(engine.layers))):
            wave.wait_layer(i)
        if not going:
            wave.cancel()
        got = wave.wait(1)
        came += got.tokens
        assert torch.equal(target.rows(at)[:, :, : got.tokens], truth[k][:, :, : got.tokens])
    settle(pipe)
    assert came
    assert not pipe.stats()["tiers"]["warm"]["corrupt"]
