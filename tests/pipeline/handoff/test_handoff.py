"""Prefill at one engine, decode at another: what is promised, what lands, and what does not."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from conftest import Engine, settle, tokens
from handing import IDS, TICKET, begin_land, chunks_of, decoder, land, prefiller, promise
from trips import get, until

from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.problems import ConfigProblems
from tierloom.pipeline.handoff.handoff import ticket_of
from tierloom.pipeline.handoff.promises import Promises

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from conftest import Open


@pytest.fixture(autouse=True)
def _nothing_broke(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What breaks is logged, and would cost but a miss."""
    yield
    assert not [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR]


def test_what_is_promised_lands_and_stays(opened: Open) -> None:
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(prefiller(), engine), opened(decoder(), engine)
    promise(p)
    assert p.store(IDS, engine.caches, at).wait().lost == {}
    settle(p)
    assert p.stats()["handoff"]["tickets"] == 1
    assert p.stats()["handoff"]["pinned"] > 0
    assert land(d, p) == 3
    until(lambda: p.stats()["handoff"] == {"tickets": 0, "pinned": 0})
    assert land(d, p) == 0  # it is here
    p.close()
    got = get(d, engine, at)
    assert (got.tokens, got.tiers, got.lost) == (192, {"hot": 3}, {})


def test_who_asks_early_waits_for_what_is_promised(opened: Open) -> None:
    """Before the ticket, and before anything is stored."""
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(prefiller(), engine), opened(decoder(), engine)
    landing = begin_land(d, p, later=True)
    until(lambda: p.stats()["serve"]["clients"] == 1)
    promise(p)
    p.store(IDS[:64], engine.caches, at[:64]).wait()
    until(lambda: d.stats()["tiers"]["hot"]["objects"] == 1)
    assert not landing.done()
    p.store(IDS, engine.caches, at).wait()
    assert landing.result(30) == 3
    assert get(d, engine, at).tokens == 192


def test_a_ticket_that_is_unknown_is_a_miss_at_once_but_names_still_find(opened: Open) -> None:
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(prefiller(), engine), opened(decoder(handoff={"wait": "60 s"}), engine)
    assert land(d, p) == 0
    p.store(IDS, engine.caches, at).wait()
    assert land(d, p, ticket=ticket_of("another's")) == 3
    assert d.stats()["handoff"]["given_up"] == 1


def test_a_ticket_that_never_comes_is_waited_for_for_a_time(opened: Open) -> None:
    """And its prefiller is asked the next time: it said so."""
    engine = Engine()
    p, d = opened(prefiller(), engine), opened(decoder(handoff={"wait": "300 ms"}), engine)
    assert begin_land(d, p, later=True).result(30) == 0
    p.store(IDS, engine.caches, engine.slots(192)).wait()
    promise(p)
    assert land(d, p) == 3


@pytest.mark.parametrize("by", ["request", "layer"])
def test_nobody_waits_for_what_will_not_come(opened: Open, by: str) -> None:
    """A store that was lost, half of whose frames may have gone out: the prefiller says so when
    all that it promised is stored or lost."""
    engine = Engine()
    at = engine.slots(192)
    p = opened(prefiller(graphs__store__pace={"by": by}), engine)
    d = opened(decoder(handoff={"wait": "60 s"}), engine)
    promise(p)
    p.store(IDS[:128], engine.caches, at[:128]).wait()
    landing = begin_land(d, p)
    until(lambda: d.stats()["tiers"]["hot"]["objects"] == 2)
    ticket = p.begin_store(IDS, engine.caches, at)
    ticket.layer_done(3)
    if by == "layer":
        before = d.stats()["handoff"]["bytes"]
        until(lambda: d.stats()["handoff"]["bytes"] > before)
    ticket.cancel()
    assert not landing.done()
    p.handoff.settle(TICKET)
    assert landing.result(20) == 2
    until(lambda: p.stats()["handoff"] == {"tickets": 0, "pinned": 0})
    assert land(d, p) == 0  # nor does who asks again
    settle(p), settle(d)


def test_a_chunk_that_lies_in_a_longer_one_lands_with_it(opened: Open) -> None:
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(prefiller(), engine), opened(decoder(), engine)
    p.store(IDS, engine.caches, at).wait()
    promise(p, IDS[:160])
    p.store(IDS[:160], engine.caches, at[:160]).wait()  # its last chunk is the head of one there
    assert land(d, p, IDS[:160]) == 3
    assert get(d, engine, at[:160], IDS[:160]).tokens == 160
    assert land(d, p, IDS[:144]) == 0  # here, in a longer one


def test_a_chunk_that_lies_in_a_longer_one_is_held_with_it(opened: Open) -> None:
    """Found by its links, all of them: what shares only some with it is another chunk."""
    engine = Engine(blocks=4000)
    p, d = opened(prefiller(tiers__hot__capacity="1 MiB"), engine), opened(decoder(), engine)
    at = engine.slots(192)
    p.store(IDS, engine.caches, at).wait()
    forked = IDS[:160].copy()
    forked[144:] += 1  # the last grain of its last chunk
    promises = p.handoff.promises
    assert promises.kept_as(chunks_of(p)[2][-32:]) == b""  # nobody was promised it
    promise(p, forked, ticket_of("forked"))
    held = promises.pinned
    assert promises.kept_as(chunks_of(p, forked)[2][-32:]) == b""
    promise(p, IDS[:160])
    assert promises.kept_as(chunks_of(p, IDS[:160])[2][-32:]) == chunks_of(p)[2][-32:]
    assert promises.pinned > held
    for seed in range(20, 60):  # evicts all that is not held
        p.store(tokens(640, seed=seed), engine.caches, engine.slots(640)).wait()
    assert land(d, p, IDS[:160]) == 3
    assert get(d, engine, at[:160], IDS[:160]).tokens == 160


@pytest.mark.parametrize("short", ["arena", "tier"])
def test_a_full_decoder_takes_a_prefix_and_waits_for_nothing(opened: Open, short: str) -> None:
    engine = Engine(blocks=4000)
    ids = tokens(64 * 200)
    at = engine.slots(len(ids))
    small = {"budget__arena": "1 MiB"} if short == "arena" else {"tiers__hot__capacity": "1 MiB"}
    p, d = opened(prefiller(), engine), opened(decoder(**small), engine)
    promise(p, ids)
    p.store(ids, engine.caches, at).wait(60)
    came = land(d, p, ids)
    assert 0 < came < 200
    got = d.retrieve(ids, engine.blank().caches, at).wait()
    assert got.tokens == 64 * came
    busy = d.arena.lease(d.arena.working - 4096)  # no room at all
    d._portal.call(d.arena.promises.reserve, d.arena.working)
    assert land_now(d, p, tokens(192, seed=8)) == 0
    d._portal.post(d.arena.promises.unreserve, d.arena.working)
    busy.release()
    d.arena.beyond = 0  # type: ignore[attr-defined]  # that lease was the test's own


def land_now(pipe: Any, at: Any, ids: np.ndarray) -> int:
    came: int = begin_land(pipe, at, ids).result(30)
    return came


def test_many_at_once_where_there_is_room_for_few(opened: Open) -> None:
    """Each takes what fits and is over; nobody waits for anybody's room."""
    engine = Engine(blocks=800)
    p = opened(prefiller(), engine)
    d = opened(decoder(budget__arena="1 MiB", tiers__hot__capacity="1 MiB"), engine)
    asked = [tokens(384, seed=seed) for seed in range(16)]
    for ids in asked:
        assert p.store(ids, engine.caches, engine.slots(384)).wait().lost == {}
    for _ in range(20):
        landings = [begin_land(d, p, ids) for ids in asked]
        came = [landing.result(20) for landing in landings]
        assert max(came) == 6
        settle(d)
        d.clear()
    assert d.stats()["handoff"]["landing"] == 0


def test_pins_take_half_of_the_tier_and_end(opened: Open) -> None:
    engine = Engine(blocks=4000)
    p = opened(
        prefiller(serve={"ticket": "60 s"}, tiers__hot__capacity="1 MiB"), engine
    )  # fmt: skip
    kept = [tokens(640, seed=seed) for seed in range(8)]
    for i, ids in enumerate(kept):
        promise(p, ids, ticket_of(str(i)))
        assert p.store(ids, engine.caches, engine.slots(640)).wait().lost == {}
    said = p.stats()["handoff"]
    assert 0 < said["pinned"] <= 1 << 19
    promised = p.lookup(kept[0])
    for seed in range(20, 60):  # evicts all that is not pinned
        p.store(tokens(640, seed=seed), engine.caches, engine.slots(640)).wait()
    assert p.lookup(kept[0]) == promised == 640
    for i in range(8):
        p.handoff.release(ticket_of(str(i)))
    for seed in range(60, 90):
        p.store(tokens(640, seed=seed), engine.caches, engine.slots(640)).wait()
    assert p.lookup(kept[0]) == 0
    assert p.stats()["handoff"] == {"tickets": 0, "pinned": 0}


def test_a_ticket_ends_some_time_after_its_last_chunk_came(opened: Open) -> None:
    engine = Engine()
    p = opened(prefiller(serve={"ticket": "200 ms"}), engine)
    promise(p)
    p.store(IDS, engine.caches, engine.slots(192)).wait()
    until(lambda: p.stats()["handoff"] == {"tickets": 0, "pinned": 0})
    now = 0.0
    promises = Promises([p.tiers["hot"]], 30.0, clock=lambda: now)
    first, *_, last = chunks_of(p)
    promises.open(TICKET, [first, last])
    now = 29.0
    assert promises.expire() == 1.0
    promises.note(last)
    now = 58.0
    assert promises.expire() == 1.0
    assert promises.pinned
    now = 59.0
    assert (promises.expire(), promises.pinned, len(promises)) == (None, 0, 0)


def test_tickets_end_when_they_are_released_or_all_is_forgotten(opened: Open) -> None:
    engine = Engine()
    p = opened(prefiller(), engine)
    for name in "abc":
        promise(p, ticket=ticket_of(name))
    promise(p, ticket=ticket_of("a"))  # twice
    p.store(IDS, engine.caches, engine.slots(192)).wait()
    pinned = p.stats()["handoff"]["pinned"]
    p.handoff.release(ticket_of("a"))
    p.handoff.release(ticket_of("unknown"))
    until(lambda: p.stats()["handoff"] == {"tickets": 2, "pinned": pinned})
    promise(p, ticket=ticket_of("unknown"))  # whoever waited for it found all and has gone
    promise(p, ticket=ticket_of("c"))
    assert p.stats()["handoff"]["tickets"] == 2
    promise(p, ticket=ticket_of("unknown"))  # of that name there is another one
    until(lambda: p.stats()["handoff"] == {"tickets": 3, "pinned": pinned})
    p.clear()
    assert p.stats()["handoff"] == {"tickets": 0, "pinned": 0}
    settle(p)


def test_what_is_released_early_is_remembered_for_a_time(opened: Open) -> None:
    now, promises = 0.0, Promises([opened(prefiller(), Engine()).tiers["hot"]], 30.0,
                                  clock=lambda: now)  # fmt: skip
    for i in range(5000):
        promises.release(ticket_of(str(i)))
    assert len(promises._over) == 4096
    promises.open(ticket_of("4999"), [b"x" * 16])
    assert len(promises) == 0
    now = 31.0
    promises.open(ticket_of("4998"), [b"x" * 16])
    assert len(promises) == 1


@pytest.mark.parametrize(
    ("peers", "token", "port", "comes"),
    [
        (["127.0.0.1"], "", True, 3), (["127.0.0.1:1, 10.0.0.7"], "", True, 0), ([], "", True, 0),
        ([], "right", True, 3), ([], "wrong", True, 0), (["127.0.0.1"], "wrong", True, 0),
        (["127.0.0.1"], "", False, 0),
    ],
)  # fmt: skip
def test_only_who_is_named_or_proves_the_token_is_dialed(
    opened: Open, tmp_path: Path, peers: list[str], token: str, port: bool, comes: int
) -> None:
    engine = Engine()
    at = engine.slots(192)
    files = {}
    for word in {"right", "wrong"} if token else ():
        files[word] = tmp_path / word
        files[word].write_text(word)
        files[word].chmod(0o600)
    guarded = {"token_file": str(files["right"])} if token else {}
    p = opened(prefiller(serve=guarded), engine)
    more = {"token_file": str(files[token])} if token else {}
    d = opened(decoder(handoff={"peers": peers} | more), engine)
    p.store(IDS, engine.caches, at).wait()
    assert land(d, p if port else None) == comes
    assert get(d, engine, at).tokens == 64 * comes


def test_one_that_is_given_up_leaves_nothing(opened: Open) -> None:
    engine = Engine()
    p, d = opened(prefiller(), engine), opened(decoder(), engine)
    promise(p)
    landing = begin_land(d, p)
    until(lambda: d.stats()["handoff"]["landing"] == 1)
    landing.cancel()
    until(lambda: d.stats()["handoff"]["landing"] == 0)
    settle(d)
    until(lambda: p.stats()["handoff"] == {"tickets": 0, "pinned": 0})


def test_mistakes_in_a_file(tmp_path: Path) -> None:
    for options in ({"wait": 2}, {"peers": ["a:b:c"]}, {"connections": 0}, {"tls": "perhaps"}):
        with pytest.raises(ConfigProblems):
            load_config(decoder(handoff=options))
    with pytest.raises(ConfigProblems, match="ticket must be positive"):
        load_config(prefiller(serve={"ticket": "0 s"}))


def came(pipe: Any, nbytes: int) -> bool:
    return bool(pipe.stats()["handoff"]["bytes"] >= nbytes)


@pytest.mark.parametrize("steps", [1, 3])
def test_layers_go_out_as_they_are_computed(opened: Open, steps: int) -> None:
    """All frames but the last layer group's are at the decoder before that is computed."""
    engine = Engine()
    at = engine.slots(192)
    p = opened(prefiller(graphs__store__pace__by="layer"), engine)
    d = opened(decoder(), engine)
    landing = begin_land(d, p, later=True)
    promise(p)
    per = 192 // steps
    for end in range(per, 193, per):
        store = p.begin_store(IDS[:end], engine.caches, at[:end])
        for layer in range(engine.layers):
            if layer == engine.layers - 2 and end == 192:
                g = p.geometry
                least = g.frame_bytes(2, 64) * 2 * (per // 64)
                until(partial(came, d, least))
                assert not landing.done()
            store.layer_done(layer)
        assert store.wait().lost == {}
    assert landing.result(30) == 3
    settle(p)
    assert get(d, engine, at).tokens == 192
    until(lambda: p.stats()["handoff"] == {"tickets": 0, "pinned": 0})


def test_a_store_that_is_given_up_half_way_is_a_miss(opened: Open) -> None:
    engine = Engine()
    at = engine.slots(192)
    p = opened(prefiller(graphs__store__pace__by="layer"), engine)
    d = opened(decoder(handoff={"wait": "500 ms"}), engine)
    landing = begin_land(d, p, later=True)
    promise(p)
    store = p.begin_store(IDS, engine.caches, at)
    store.layer_done(1)
    until(lambda: d.stats()["handoff"]["bytes"] > 0)
    store.cancel()
    assert landing.result(30) == 0
    settle(d)
    assert get(d, engine, at).tokens == 0
    p.handoff.release(TICKET)
    settle(p)


def test_one_that_was_restarted_knows_no_ticket_and_is_asked_again(opened: Open) -> None:
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(prefiller(), engine), opened(decoder(handoff={"wait": "60 s"}), engine)
    promise(p)
    p.store(IDS[:64], engine.caches, at[:64]).wait()
    assert land(d, p, IDS[:64]) == 1
    where = p.serves_at.removeprefix("tierloom://")
    p.close()
    again = opened(prefiller(serve={"listen": where}), engine)
    assert land(d, again) == 0
    again.store(IDS, engine.caches, at).wait()
    assert land(d, again) == 2
    assert get(d, engine, at).tokens == 192


def test_one_that_has_gone_leaves_no_connection_open(opened: Open) -> None:
    engine = Engine()
    p, d = opened(prefiller(), engine), opened(decoder(), engine)
    p.store(IDS, engine.caches, engine.slots(192)).wait()
    assert land(d, p) == 3
    (known,) = d.handoff._engines._engines.values()
    assert known.client._pool._idle
    p.close()
    until(lambda: not known.client._pool._idle)
    until(lambda: d.handoff._engines._timer is None)


@pytest.mark.parametrize("how", ["clear", "close"])
def test_what_is_under_way_ends_with_a_reset_and_with_the_pipeline(opened: Open, how: str) -> None:
    engine = Engine()
    at = engine.slots(192)
    p = opened(prefiller(graphs__store__pace__by="layer"), engine)
    d = opened(decoder(), engine)
    landing = begin_land(d, p, later=True)
    promise(p)
    store = p.begin_store(IDS, engine.caches, at)
    store.layer_done(1)
    until(lambda: came(d, 1))
    getattr(d, how)()
    until(landing.done)
    assert landing.cancelled()
    if how == "clear":
        store.layer_done(engine.layers - 1)
        store.wait()
        settle(d)
        assert get(d, engine, at).tokens == 0
    else:
        store.cancel()
        assert d.arena.leases == 0
