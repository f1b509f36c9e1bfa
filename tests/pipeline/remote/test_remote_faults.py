"""Servers of remote stores that hang, die and come back: misses, and nothing waits for them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import Engine, settle, tokens
from kinds import SERVED, kinds
from stores import IDS
from trips import AMPLE, PACES, PATIENCE, SHORT, away, cold, get, given_up_at_random, lands, until

from tierloom import Lost

if TYPE_CHECKING:
    from conftest import Open
    from stores import Store

WARM = tokens(192, seed=1)
GONE = {Lost.TIER_DOWN, Lost.LATE}


@pytest.mark.parametrize(
    ("store", "which"), [*((name, 0) for name in SERVED), ("mooncake", 1)], indirect=["store"]
)
@pytest.mark.parametrize("end", ["hangs", "dies"])
def test_a_server_that_is_gone_and_comes_back(
    over: Open, store: Store, which: int, end: str
) -> None:
    """Memory before it goes on serving what it has acknowledged."""
    engine, victim = Engine(), store.victims[which]
    at = engine.slots(192)
    pipes = [over(engine, hot=True, by=by, model=by, **AMPLE) for by in PACES]
    for pipe in pipes:
        lands(pipe, engine, at)
        assert cold(pipe).store(WARM, engine.caches, at).wait().tiers.get("hot") == 3
        settle(pipe)
    with away(victim, end):
        for pipe in pipes:
            for seed in (2, 3):
                get(pipe, engine, at, gone=True)
                began, fresh = time.monotonic(), tokens(192, seed=seed)
                late = pipe.store(fresh, engine.caches, at).wait()
                assert time.monotonic() - began < PATIENCE
                assert late.tiers == {"hot": 3}
                assert late.lost.keys() <= GONE
                for ids in (WARM, fresh):
                    assert pipe.lookup(ids) == 192
                    assert get(pipe, engine, at, ids).tiers == {"hot": 3}
            assert pipe.tiers["cold"].reading.failures >= 2, "its breaker is open"
            if store.pooled:
                calls: Any = pipe.tiers["cold"].tier._calls  # type: ignore[attr-defined]
                assert len(calls._running) <= calls.limit
    for pipe in pipes:
        if end == "hangs" or store.lasting:
            until(lambda pipe=pipe: get(cold(pipe), engine, at).tokens == 192)
        else:
            assert get(cold(pipe), engine, at).tokens == 0
        for ids in (IDS, tokens(192, seed=9)):
            lands(pipe, engine, at, ids)
        restarts = pipe.stats()["tiers"]["cold"].get("restarts")
        assert restarts == (1 if store.tier["use"] == "server" and end == "dies" else None)


@kinds(SERVED)
def test_an_engine_that_starts_before_its_server(over: Open, store: Store) -> None:
    engine = Engine()
    at = engine.slots(192)
    for victim in reversed(store.victims):
        victim.kill()
    pipe = over(engine, **SHORT)
    get(pipe, engine, at, gone=True)
    late = pipe.store(IDS, engine.caches, at).wait()
    assert (late.tokens, late.tiers) == (0, {})
    assert late.lost
    assert late.lost.keys() <= GONE
    for victim in store.victims:
        victim.start()
    lands(pipe, engine, at)


# A pool's master takes seconds to see that an owner has gone.
@kinds([name for name in SERVED if name != "mooncake"])
def test_killed_while_it_is_read(over: Open, store: Store) -> None:
    """At each layer group: what was placed is right, or was not placed."""
    engine = Engine()
    at = engine.slots(192)
    pipe = over(engine, by="layer", **SHORT)
    for last in range(0, engine.layers, 2):
        lands(pipe, engine, at)

        def kill(i: int, last: int = last) -> None:
            if i == last:
                store.victims[-1].kill()

        get(pipe, engine, at, layer=kill)
        store.victims[-1].start()


def torture(over: Open, store: Store) -> None:
    """Requests given up at random, over servers that are paused and killed now and then."""
    rng, engine = np.random.default_rng(0), Engine(blocks=80)
    pipe = over(engine, hot=True, by="layer", **SHORT)
    prompts = [tokens(int(rng.integers(1, 400)), seed=seed) for seed in range(5)]
    slots = [engine.slots(len(ids)) for ids in prompts]
    end, rounds, hits = time.monotonic() + 3, 0, 0
    for ids, at in zip(prompts, slots, strict=True):
        lands(pipe, engine, at, ids)
    while time.monotonic() < end or rounds < 40:
        rounds += 1
        victim = store.victims[rounds // 40 % len(store.victims)]
        if rounds % 40 in (12, 15):
            victim.pause() if rounds % 40 == 12 else victim.resume()
        elif rounds % 40 in (26, 29):
            victim.kill() if rounds % 40 == 26 else victim.start()
        k = int(rng.integers(len(prompts)))
        got = given_up_at_random(
            pipe, engine, slots[k], prompts[k], rng, share=0.3, empty=0.7
        )  # fmt: skip
        hits += got is not None and "cold" in got.tiers
    settle(pipe)
    assert hits, "nothing was ever read"
    assert not pipe.stats()["tiers"]["cold"]["corrupt"]


@kinds([name for name in SERVED if name != "server-unix"])  # to its client, one with tcp
def test_torture(over: Open, store: Store) -> None:
    torture(over, store)


@kinds(["redis-small"])
def test_torture_of_a_store_that_evicts(over: Open, store: Store) -> None:
    torture(over, store)
