"""Stores that are asked one by one: what a prompt hits is searched, and holes cost misses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from conftest import Engine, settle, tokens
from kinds import kinds
from trips import get, lands

from tierloom import Lost
from tierloom.stages.kv.prefix import grain_links

if TYPE_CHECKING:
    from conftest import Open
    from stores import Store

    from tierloom import Pipeline

CHUNKS = 40
ENGINE: dict[str, Any] = {"heads": 1, "dim": 8, "blocks": 160}
LONG = tokens(64 * CHUNKS, 3)


def removed(store: Store, pipe: Pipeline, *chunks: int) -> None:
    """Somebody deletes chunks of LONG."""
    keys = grain_links(pipe._requests._seed("", "", ()), LONG, 16)[3::4]
    names: dict[str, Any] = {path.name: path for path in store.values(pipe)}
    for chunk in chunks:
        store.set(pipe, names[f"{keys[chunk].hex()}.tlm"], None)


def asked(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys each call of the tier's `exists` asked for, from now on."""
    tier: Any = pipe.tiers["cold"].tier
    counts: list[int] = []
    inner = tier.exists

    async def exists(keys: Any) -> Any:
        counts.append(len(keys))
        return await inner(keys)

    monkeypatch.setattr(tier, "exists", exists)
    return counts


@kinds(["s3"])
def test_few_questions(over: Open, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(**ENGINE)
    pipe, at = over(engine), engine.slots(len(LONG))
    lands(pipe, engine, at, LONG)
    counts = asked(pipe, monkeypatch)
    for length in (CHUNKS, 17, 1):
        other = LONG.copy()
        other[64 * length :] += 1
        counts.clear()
        assert get(pipe, engine, at, other).tokens == 64 * length
        assert sum(counts) <= 11
        assert len(counts) <= 4


@kinds(["files", "s3"])
def test_a_hole(over: Open, store: Store) -> None:
    """It is found by a read, planned no more, and filled by the next store."""
    engine = Engine(**ENGINE)
    pipe, at = over(engine), engine.slots(len(LONG))
    lands(pipe, engine, at, LONG)
    removed(store, pipe, 7)
    got = get(pipe, engine, at, LONG)
    assert got.tokens == 7 * 64
    figures: Any = pipe.stats()["tiers"]["cold"]
    hits, misses = figures["hits"], figures["misses"]
    got = get(pipe, engine, at, LONG)
    assert (got.tokens, got.lost) == (7 * 64, {})
    figures = pipe.stats()["tiers"]["cold"]
    assert (figures["hits"], figures["misses"]) == (hits + 7, misses)
    pipe.store(LONG, engine.caches, at).wait()
    settle(pipe)
    assert get(pipe, engine, at, LONG).tokens == len(LONG)


@kinds(["files"])
def test_what_lies_on_a_disk_is_no_hole(over: Open, store: Store, tmp_path: Any) -> None:
    engine = Engine(**ENGINE)
    disk = {"use": "disk", "path": str(tmp_path / "warm"), "capacity": "8 MiB", "keep_free": 0}
    put = {"use": "put", "tier": "warm", "when_full": "block"}
    pipe = over(engine, tiers__warm=disk, graphs__store__stages__warm=put)
    at = engine.slots(len(LONG))
    lands(pipe, engine, at, LONG)
    removed(store, pipe, *range(9), 20, 39)
    keys = grain_links(pipe._requests._seed("", "", ()), LONG, 16)[3::4]
    there = {keys[i] for i in (*range(9), 20, 39)}
    pipe._portal.call(pipe.tiers["warm"].delete, [key for key in keys if key not in there])
    assert get(pipe, engine, at, LONG).tokens == len(LONG)
    pipe._portal.call(pipe.tiers["warm"].delete, [keys[20]])
    got = get(pipe, engine, at, LONG)
    assert got.tokens == 20 * 64
    assert set(got.lost) <= {Lost.ABSENT}
