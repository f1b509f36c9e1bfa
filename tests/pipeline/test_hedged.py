"""Hedged reads: the next tier is asked, too; what comes first is taken; all memory goes home.

Afterwards (see `opened`) all leases are home and no request is open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import Engine, config, tokens

from tierloom.stages.ops.get import Get

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Open

MEMORY = {"use": "memory", "capacity": "8 MiB"}
SLOW = {"use": "slow", "capacity": "8 MiB", "timeout": "10 s"}


def hedged(
    hot: dict[str, Any], warm: dict[str, Any], hedge: str = "20 ms", **changes: Any
) -> dict[str, Any]:
    """Two tiers that both have everything, the first of which is hedged with the second."""
    source = config(
        tiers__hot=hot, tiers__warm=warm,
        graphs__retrieve__stages__fetch={"use": "get", "hedge": hedge},
        graphs__store__deadline="20 s", graphs__retrieve__deadline="5 s", **changes,
    )  # fmt: skip
    source["graphs"]["store"]["stages"]["warm"] = {
        "use": "put", "tier": "warm", "when_full": "block",
    }  # fmt: skip
    return source


@pytest.mark.parametrize(
    ("hot", "warm", "delivers"),
    [
        (SLOW | {"delay": "1 s"}, MEMORY, "warm"),
        (SLOW | {"delay": "300 ms"}, SLOW | {"delay": "1 s"}, "hot"),
        (SLOW | {"delay": "300 ms"}, {**MEMORY, "use": "stuck", "at": "read"}, "hot"),
        (SLOW | {"delay": "300 ms"}, {"use": "mock", "loss": 1.0}, "hot"),
        (MEMORY, {**MEMORY, "use": "stuck", "at": "read"}, "hot"),
        ({**MEMORY, "use": "stuck", "at": "first_byte"}, MEMORY, "warm"),
        ({"use": "mock", "loss": 1.0}, MEMORY, "warm"),
        ({"use": "mock", "latency": "700 ms", "timeout": "9 s"},
         {"use": "mock", "latency": "150 ms"}, "warm"),
    ],
)  # fmt: skip
def test_what_comes_first_is_taken(opened: Open, hot: Any, warm: Any, delivers: str) -> None:
    engine = Engine()
    pipe, target, ids = opened(hedged(hot, warm), engine), engine.blank(), tokens(150)
    at = engine.slots(150)
    assert pipe.store(ids, engine.caches, at).wait().tokens == 150
    got = pipe.retrieve(ids, target.caches, at).wait(10)
    assert (got.tokens, got.tiers) == (150, {delivers: 3})
    assert torch.equal(engine.rows(at), target.rows(at))
    assert pipe.stats()["arena"]["flight"] == 0


def test_what_answers_in_time_is_asked_alone(opened: Open) -> None:
    engine = Engine()
    pipe, target, ids = opened(hedged(MEMORY, MEMORY, "4 s"), engine), engine.blank(), tokens(150)
    at = engine.slots(150)
    pipe.store(ids, engine.caches, at).wait()
    assert pipe.retrieve(ids, target.caches, at).wait().tiers == {"hot": 3}
    assert pipe.stats()["tiers"]["warm"]["hits"] == 0


def test_neither_delivers(opened: Open) -> None:
    engine = Engine()
    stuck = {**MEMORY, "use": "stuck", "at": "first_byte", "timeout": "200 ms"}
    pipe, target = opened(hedged(stuck, stuck), engine), engine.blank()
    ids, at = tokens(150), engine.slots(150)
    pipe.store(ids, engine.caches, at).wait()
    assert pipe.retrieve(ids, target.caches, at).wait(10).tokens == 0
    assert target.untouched(at[:0])


def test_layer_by_layer(opened: Open, tmp_path: Path) -> None:
    """The tier that delivered the first layers delivers the others."""
    engine = Engine()
    far = {"use": "mock", "latency": "700 ms", "timeout": "9 s"}
    source = hedged(far, {"use": "files", "path": str(tmp_path)})
    source["graphs"]["retrieve"]["pace"] = {"by": "layer", "window": 1}
    pipe, target, ids = opened(source, engine), engine.blank(), tokens(150)
    at = engine.slots(150)
    pipe.store(ids, engine.caches, at).wait()
    wave = pipe.begin_retrieve(ids, target.caches, at)
    for i in range(engine.layers):
        assert wave.wait_layer(i) == 150
    assert wave.wait().tiers == {"warm": 3}
    assert torch.equal(engine.rows(at), target.rows(at))


def test_without_memory_for_both_the_first_is_given_up(opened: Open, monkeypatch) -> None:
    """The arena has room for one request's objects: a hedge must not wait for what it holds."""
    gave_up = []

    async def also(self: Get, *words: Any) -> bool:
        before = self.ctx.tiers["warm"].counts.hits
        done = await plain(self, *words)
        gave_up.append(done and self.ctx.tiers["warm"].counts.hits == before)
        return done

    plain = Get._ask_second
    monkeypatch.setattr(Get, "_ask_second", also)
    engine = Engine()
    far = {"use": "mock", "latency": "500 ms", "timeout": "10 s"}
    source = hedged(far, {"use": "mock"}, budget={"arena": "1 MiB"})
    pipe, ids, at = opened(source, engine), tokens(150), engine.slots(150)
    assert pipe.store(ids, engine.caches, at).wait().tokens == 150
    own = 3 * pipe._runners["retrieve"]._admission.chunk_bytes
    for left, gives_up in ((own, True), (pipe.arena.working, False)):
        taken = pipe.arena.working - left
        pipe._portal.call(pipe.arena.promises.reserve, taken)
        target = engine.blank()
        got = pipe.retrieve(ids, target.caches, at).wait(10)
        assert (got.tokens, got.tiers) == (150, {"warm": 3})
        assert torch.equal(engine.rows(at), target.rows(at))
        assert gave_up.pop() is gives_up
        assert not gave_up
        pipe._portal.call(unreserve, pipe.arena, taken)
    assert pipe.arena.promises.spare == pipe.arena.working


async def unreserve(arena: Any, nbytes: int) -> None:
    arena.promises.unreserve(nbytes)
