"""Tiers that are slow, flaky, stuck or full: the engine never notices more than a miss.

Afterwards (see `opened`) all leases are home, no request is open and the portal has ended.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import Engine, config, settle, tokens
from trips import given_up_at_random

from tierloom import Lost

if TYPE_CHECKING:
    from conftest import Open

FAULTS: dict[str, dict[str, Any]] = {
    "slow": {"use": "slow", "delay": "30 ms"},
    "slower than the deadline": {"use": "slow", "delay": "5 s"},
    "flaky": {"use": "flaky", "rate": 0.5, "seed": 3},
    "always failing": {"use": "flaky", "rate": 1.0},
    "lying": {"use": "flaky", "rate": 0.5, "seed": 3, "corrupt": True},
    "stuck putting": {"use": "stuck", "at": "put"},
    "stuck reading": {"use": "stuck", "at": "read"},
    "stuck at the first byte": {"use": "stuck", "at": "first_byte"},
    "full": {"use": "full"},
    "losing": {"use": "mock", "loss": 0.5, "seed": 3},
    "far away": {"use": "mock", "latency": "2 s"},
}
PACES = [None, {"by": "layer", "window": 1}]


def faulty(fault: str, pace: Any, deadline: str = "400 ms", **changes: Any) -> dict[str, Any]:
    """A good memory tier in front of the faulty one; both are written to."""
    warm = FAULTS[fault] | {"capacity": "8 MiB", "timeout": "300 ms", "probe": "100 ms"}
    made = config(
        tiers__warm=warm,
        graphs__store__deadline=deadline,
        graphs__retrieve__deadline=deadline,
        **changes,
    )
    made["graphs"]["store"]["stages"]["warm"] = {"use": "put", "tier": "warm", "when_full": "block"}
    if pace:
        made["graphs"]["store"]["pace"] = made["graphs"]["retrieve"]["pace"] = pace
    return made


@pytest.mark.parametrize("pace", PACES, ids=["by request", "by layer"])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_bad_tier_costs_its_own_chunks_and_no_more(opened: Open, fault: str, pace: Any) -> None:
    engine = Engine()
    # The faulty tier may take 300 ms of each request before the good one is asked.
    pipe = opened(faulty(fault, pace, "1 s"), engine)
    requests = [tokens(150, seed=s) for s in range(6)]
    at = engine.slots(150)
    for ids in requests:
        ticket = pipe.begin_store(ids, engine.caches, at)
        for i in range(engine.layers):
            ticket.layer_done(i)
        begun = time.monotonic()
        assert ticket.captured()
        receipt = ticket.wait()
        assert time.monotonic() - begun < 10  # generous: a deadline of 1 s on a loaded machine
        assert receipt.tokens == 150, "the good tier must have kept it"
    settle(pipe)
    for clear in (False, True):
        if clear:
            pipe._portal.call(pipe.tiers["hot"].clear)
        for ids in requests:
            target = engine.blank()
            wave = pipe.begin_retrieve(ids, target.caches, at)
            for i in range(engine.layers):
                wave.wait_layer(i)
            got = wave.wait()
            if not clear:
                assert got.tokens == 150
            n = got.tokens
            assert n == 0 or torch.equal(engine.rows(at[:n]), target.rows(at[:n])), "wrong bytes"
            assert n == 150 or got.lost or pipe.lookup(ids) < 150
        settle(pipe)


def test_a_dead_tier_opens_its_breaker_and_is_left_out(opened: Open) -> None:
    engine = Engine()
    pipe = opened(faulty("always failing", None), engine)
    at = engine.slots(64)
    lost = []
    for seed in range(8):
        lost.append(pipe.store(tokens(64, seed=seed), engine.caches, at).wait().lost)
        settle(pipe)
    assert lost[0] == {Lost.TIER_DOWN: 1}
    assert not pipe.tiers["warm"].available or lost[-1] == {}
    assert pipe.stats()["tiers"]["hot"]["puts"] == 8


def test_a_store_that_no_tier_can_take_keeps_nothing(opened: Open) -> None:
    engine = Engine()
    pipe = opened(config(), engine)
    pipe.tiers["hot"].trip(OSError("gone"))
    got = pipe.store(tokens(64), engine.caches, engine.slots(64)).wait()
    assert (got.tokens, got.nbytes, got.lost) == (0, 0, {Lost.TIER_DOWN: 1})


def test_a_hedged_read_goes_on_to_the_next_tier(opened: Open) -> None:
    engine = Engine()
    source = config(
        tiers__hot={"use": "slow", "capacity": "8 MiB", "delay": "3 s", "timeout": "10 s"},
        tiers__warm={"use": "memory", "capacity": "8 MiB"},
        graphs__retrieve__stages__fetch={"use": "get", "hedge": "20 ms"},
        graphs__store__deadline="10 s",
    )
    source["graphs"]["store"]["stages"]["warm"] = {"use": "put", "tier": "warm"}
    pipe, target, ids = opened(source, engine), engine.blank(), tokens(150)
    at = engine.slots(150)
    assert pipe.store(ids, engine.caches, at).wait().tiers == {"hot": 3, "warm": 3}
    got = pipe.retrieve(ids, target.caches, at).wait(2)
    assert (got.tokens, got.tiers) == (150, {"warm": 3})
    assert torch.equal(engine.rows(at), target.rows(at))


def test_a_slow_branch_never_holds_back_its_sibling(opened: Open) -> None:
    engine = Engine(layers=4)
    source = faulty("slower than the deadline", None)
    source["graphs"]["store"]["stages"]["warm"] = {
        "use": "put",
        "tier": "warm",
        "depth": 1,
        "width": 1,
    }
    source["tiers"]["warm"]["timeout"] = "10 s"
    pipe = opened(source, engine)
    at = engine.slots(64)
    tickets = [pipe.store(tokens(64, seed=s), engine.caches, at) for s in range(12)]
    for _ in range(200):
        if pipe.stats()["tiers"]["hot"]["puts"] == 12:
            break
        time.sleep(0.01)
    assert pipe.stats()["tiers"]["hot"]["puts"] == 12, "held back"
    receipts = [t.wait() for t in tickets]
    assert sum(r.lost.get(Lost.FULL, 0) for r in receipts) >= 8
    assert pipe.stats()["graphs"]["store"]["dropped"] >= 8


@pytest.mark.parametrize("policy", ["block", "spill"])
def test_block_and_spill_lose_nothing(opened: Open, policy: str) -> None:
    engine = Engine(layers=4)
    source = faulty("slow", None)
    source["graphs"]["store"]["deadline"] = "20 s"
    source["graphs"]["store"]["stages"]["warm"] = {
        "use": "put",
        "tier": "warm",
        "depth": 1,
        "width": 1,
        "when_full": policy,
    }
    pipe = opened(source, engine)
    at = engine.slots(64)
    tickets = [pipe.store(tokens(64, seed=s), engine.caches, at) for s in range(12)]
    assert [t.wait().lost for t in tickets] == [{}] * 12
    assert pipe.stats()["tiers"]["warm"]["puts"] == 12


def test_the_engine_never_waits_past_its_deadline(opened: Open) -> None:
    """Held against the clock of the ticket itself, with room for a loaded machine."""
    engine = Engine()
    source = faulty("stuck reading", None)
    source["tiers"]["warm"]["timeout"] = "60 s"
    pipe, ids, at = opened(source, engine), tokens(150), engine.slots(150)
    pipe.store(ids, engine.caches, at).wait()
    settle(pipe)
    pipe._portal.call(pipe.tiers["hot"].clear)
    for wait in (
        lambda t: t.wait(),
        lambda t: t.wait(timeout=0.1),
        lambda t: t.wait_layer(0),
        lambda t: t.captured(),
    ):
        target = engine.blank()
        ticket = pipe.retrieve(ids, target.caches, at)
        wait(ticket)
        assert time.monotonic() < ticket._request.deadline + 5
        assert ticket._request.cancelled in (Lost.LATE, Lost.CANCELLED)
        assert target.untouched(np.array([], int))
        assert ticket.wait().tokens == 0
    settle(pipe)


@pytest.mark.parametrize("when", ["at once", "after the plan", "in the middle", "at the end"])
@pytest.mark.parametrize("graph", ["store", "retrieve"])
def test_cancelled_at_any_point(opened: Open, graph: str, when: str) -> None:
    engine = Engine(layers=12)
    pace = {"by": "layer", "window": 1}
    pipe = opened(config(graphs__store__pace=pace, graphs__retrieve__pace=pace), engine)
    ids, at = tokens(150), engine.slots(150)
    if graph == "retrieve":
        pipe.store(ids, engine.caches, at).wait()
    target = engine.blank()
    begin = pipe.begin_store if graph == "store" else pipe.begin_retrieve
    ticket = begin(ids, engine.caches if graph == "store" else target.caches, at)
    steps = {"at once": 0, "after the plan": 0, "in the middle": 6, "at the end": 12}[when]
    if when != "at once":
        ticket.planned()
    for i in range(steps):
        ticket.layer_done(i) if graph == "store" else ticket.wait_layer(i)
    ticket.cancel()
    frozen = [t.clone() for t in target.flat]
    receipt = ticket.wait()
    settle(pipe)
    assert all(torch.equal(a, b) for a, b in zip(frozen, target.flat, strict=True)), (
        "written after cancel()"
    )
    if steps < 12:
        assert receipt.tokens == 0
        assert graph == "retrieve" or pipe.lookup(ids) == 0


def test_closing_gives_up_what_is_open(opened: Open) -> None:
    engine = Engine()
    pipe = opened(config(graphs__store__deadline="60 s"), engine)
    never = pipe.begin_store(tokens(64), engine.caches, engine.slots(64))  # its layers never come
    pipe.close()
    assert never.wait(1).lost == {Lost.CANCELLED: 1}


def test_too_many_requests_are_refused_as_misses(opened: Open) -> None:
    engine = Engine()
    pipe = opened(config(budget__inflight=2), engine)
    at = engine.slots(64)
    open_ = [pipe.begin_store(tokens(64, seed=s), engine.caches, at) for s in range(2)]
    assert pipe.store(tokens(64, seed=5), engine.caches, at).wait().lost == {Lost.FULL: 1}
    for ticket in open_:
        for i in range(engine.layers):
            ticket.layer_done(i)
    assert [t.wait().tokens for t in open_] == [64, 64]


def test_a_broken_stage_is_logged_once_and_the_graph_stands_aside(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tierloom.stages.ops.scatter import Scatter

    def broken(self: Scatter, batch: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Scatter, "apply", broken)
    engine = Engine()
    pipe, ids, at = opened(config(), engine), tokens(64), engine.slots(64)
    pipe.store(ids, engine.caches, at).wait()
    for _ in range(7):
        got = pipe.retrieve(ids, engine.caches, at).wait()
        assert (got.tokens, list(got.lost)) == (0, [Lost.BROKEN])
    assert pipe.stats()["graphs"]["retrieve"]["degraded"]
    assert pipe.stats()["stages"]["retrieve"]["fetch"]["broken"] == 5, "it should have stood aside"
    assert len([r for r in caplog.records if "stage broke" in r.getMessage()]) == 1
    assert pipe.store(tokens(64, seed=1), engine.caches, at).wait().tokens == 64


def test_torture(opened: Open) -> None:
    """Requests cancelled at random over a flaky tier: bounded, and everything comes home."""
    rng = np.random.default_rng(0)
    engine = Engine(blocks=80)
    pipe = opened(
        faulty("flaky", {"by": "layer", "window": 1}, tiers__hot__capacity="1 MiB"), engine
    )
    prompts = [tokens(int(rng.integers(1, 400)), seed=s) for s in range(12)]
    slots = [engine.slots(len(p)) for p in prompts]
    end = time.monotonic() + 6
    rounds = 0
    while time.monotonic() < end and rounds < 400:
        rounds += 1
        k = int(rng.integers(len(prompts)))
        given_up_at_random(pipe, engine, slots[k], prompts[k], rng, share=0.55)
    settle(pipe)
    assert rounds > 20
