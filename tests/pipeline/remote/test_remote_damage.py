"""Damage to what a remote store keeps, and a wire that lies: misses, and never a wrong byte."""

from __future__ import annotations

import contextlib
import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from buckets import Gate
from conftest import Engine, settle, tokens
from kinds import DAMAGED, WIRED, kinds
from trips import PACES, get, lands

from tierloom import Lost

if TYPE_CHECKING:
    from conftest import Open
    from stores import Store

PAGE = 4096


def changed(kind: str, raw: bytes, rng: np.random.Generator) -> bytes | None:
    """A value with one thing wrong; None: it is gone."""
    made, spot = bytearray(raw), int(rng.integers(len(raw)))
    page = spot // PAGE * PAGE
    if kind == "flip":
        made[spot] ^= 1 << int(rng.integers(8))
    elif kind == "zero":
        made[page : page + PAGE] = bytes(len(made[page : page + PAGE]))
    elif kind == "truncate":
        del made[page if rng.random() < 0.5 else spot :]
    elif kind == "lengthen":
        made += bytes(PAGE if rng.random() < 0.5 else spot)
    else:
        return b"" if kind == "empty" else None
    return bytes(made)


@kinds(DAMAGED)
@pytest.mark.parametrize("kind", ["flip", "zero", "swap", "truncate", "lengthen", "empty", "gone"])
def test_damage(over: Open, store: Store, kind: str) -> None:
    if store.fixed and kind in ("truncate", "lengthen", "empty", "gone"):
        pytest.skip("its values lie side by side, and have no lengths of their own")
    engine, rng = Engine(heads=4, dim=32, blocks=16), np.random.default_rng(7)
    at, misses = engine.slots(192), 0
    for by in PACES:
        pipe = over(engine, by=by)
        missed = 0
        for _ in range(3):
            lands(pipe, engine, at)
            names = store.values(pipe)
            # Three chunks; of Redis a manifest and pieces, of a pool a record, a header and frames.
            # Pieces of what was damaged before may be left.
            assert len(names) == 3 if store.whole else len(names) >= 3 * (4 + store.pooled)
            one, two = (names[int(n)] for n in rng.choice(len(names), 2, replace=False))
            raw = store.get(pipe, one)
            if kind == "swap":
                store.set(pipe, one, store.get(pipe, two))
                store.set(pipe, two, raw)
            else:
                store.set(pipe, one, changed(kind, raw, rng))
            got = get(pipe, engine, at)
            assert got.tokens in (0, 64, 128, 192)
            assert got.lost.keys() <= {Lost.CORRUPT, Lost.ABSENT}
            missed += got.tokens < 192
        lands(pipe, engine, at)
        figures: Any = pipe.stats()["tiers"]["cold"]
        if store.whole and kind != "gone":
            assert figures["corrupt"] >= missed
        elif kind not in ("gone", "empty"):
            assert figures["corrupt"] + figures["misses"] >= missed
        assert pipe.tiers["cold"].reading.failures == 0, "damage is no reason to leave a tier alone"
        misses += missed
        pipe.close()
    assert misses >= 2, "the damage never hit anything"


@kinds(WIRED)
@pytest.mark.parametrize("fault", ["slow", "cut", "lying"])
def test_a_bad_wire(over: Open, store: Store, fault: str) -> None:
    if fault == "cut" and store.fragile:
        pytest.skip("the server does not survive a reader who hangs up")
    chance = random.Random(5)
    faults = 0

    def change(data: bytes) -> bytes:
        nonlocal faults
        if not bad or chance.random() > 0.3:
            return data
        faults += 1
        if fault == "slow":
            time.sleep(0.01)
        elif fault == "cut":
            raise ConnectionError
        else:
            made = bytearray(data)
            made[chance.randrange(len(made))] ^= 1 << chance.randrange(8)
            data = bytes(made)
        return data

    engine, bad = Engine(), True
    prompts = [tokens(192, seed=seed) for seed in range(2)]
    at = engine.slots(192)
    short: dict[str, Any] = {
        "graphs__store__deadline": "400 ms", "graphs__retrieve__deadline": "400 ms",
        "tiers__cold__timeout": "300 ms", "tiers__cold__fails": 1000,
    }  # fmt: skip
    with contextlib.closing(Gate(store.port)) as gate:
        gate.change = change
        pipes = [over(engine, by=by, port=gate.port, **short) for by in PACES]
        for _ in range(3):
            for ids in prompts:
                for pipe in pipes:
                    stored = pipe.store(ids, engine.caches, at).wait()
                    settle(pipe)
                    assert stored.tokens in (0, 64, 128, 192)
                    get(pipe, engine, at, ids)
        assert faults > 3, "the wire was never bad"
        bad = False
        store.revive()
        for pipe in pipes:
            for ids in prompts:
                lands(pipe, engine, at, ids)
            pipe.close()
