"""Remote stores are shared: what one process has stored another finds, and no more than that."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from conftest import Engine
from kinds import KINDS, kinds
from other_process import Other
from stores import AWS, IDS
from trips import PACES, get

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Open
    from stores import Store

WHOLE = {"tokens": 192, "tiers": {"cold": 3}, "lost": 0, "cleared": 0}


@pytest.fixture(scope="session")
def others() -> Iterator[list[Other]]:
    """Two more processes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    made = [Other(kept | AWS) for _ in range(2)]
    yield made
    for each in made:
        each.close()


@kinds(list(KINDS))
def test_what_another_process_stored(over: Open, store: Store, others: Any) -> None:
    assert others[0].stores(store.config(), store.model) == WHOLE
    engine = Engine()
    at = engine.slots(192)
    for by in PACES:
        pipe = over(engine, by=by)
        for _ in range(2):
            got = get(pipe, engine, at)
            assert (got.tokens, got.lost, got.tiers) == (192, {}, {"cold": 3})
        assert pipe.stats()["tiers"]["cold"]["hits"] == 6
        assert pipe.store(IDS, engine.caches, at).wait().tiers == {}, "it is all there already"
        pipe.close()  # of one kind, a folder belongs to one process at a time


@kinds([name for name in KINDS if name != "nixl-static"])  # it has no names but one
def test_each_clears_its_own(over: Open, store: Store, others: Any) -> None:
    one, two = others
    assert one.stores(store.config(), store.model) == WHOLE
    engine = Engine()
    at = engine.slots(192)
    pipe, stranger = over(engine), over(engine, model="another")
    assert get(stranger, engine, at).tokens == 0
    assert stranger.clear() == 0
    said = two.stores(store.config(), store.model + "a third", clear=True)
    assert said == WHOLE | {"cleared": 3}
    assert get(pipe, engine, at).tokens == 192
    said = two.stores(store.config(), store.model, clear=True)
    assert said["tiers"] == {}, "it is all there already"
    assert said["cleared"] == (3 if store.counting else 0)
    assert get(pipe, engine, at).tokens == 0


@kinds(list(KINDS))
def test_what_came_is_promoted(over: Open, store: Store) -> None:
    """But for what was lent: it lies in this host's memory already."""
    engine = Engine()
    at = engine.slots(150)
    one, ids = over(engine), IDS[:150]  # two chunks and a part of one
    assert one.store(ids, engine.caches, at).wait().lost == {}
    one.close()
    two = over(engine, hot=True)
    for tier in ("cold", "cold" if store.lends else "hot"):
        got = get(two, engine, at, ids)
        assert (got.tokens, got.tiers) == (150, {tier: 3})
