"""Hand-offs between engines whose workers hold other shares of a model's KV: the decoder's bytes
are those of one engine that holds all, or nothing comes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import Engine, settle, tokens
from handing import TICKET, decoder, prefiller
from trips import until

from tierloom.pipeline.handoff.handoff import ticket_of
from tierloom.pipeline.handoff.shares import OwnShare
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.prefix import Chain
from tierloom.stages.tiers.server.protocol import BadMessage
from tierloom.stages.tiers.server.ranks import RankShare, pack_ranks, unpack_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Open

LAYERS, HEADS, TOKENS = 6, 4, 144
IDS = tokens(TOKENS)
AT = np.arange(TOKENS)


@pytest.fixture(autouse=True)
def _nothing_broke(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setattr("tierloom.pipeline.handoff.dialed_engines.DIAL", 20.0)  # machines are busy
    yield
    assert not [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR]


@pytest.fixture
def whole() -> Engine:
    return Engine(layers=LAYERS, heads=HEADS)


def cut(whole: Engine, layers: tuple[int, int], heads: tuple[int, int], order: str) -> Engine:
    """An engine that holds some of another one's KV, in blocks of its own."""
    made = Engine(order, layers=layers[1] - layers[0], heads=heads[1] - heads[0], seed=9)
    rows = whole.rows(AT)  # [kv, layers, tokens, heads, bytes]
    mine = rows[:, layers[0] : layers[1], :, heads[0] : heads[1]]
    from tierloom.stages.kv.layout_check import token

    for i, cache in enumerate(made.caches):
        for kv in range(2):
            for slot in range(TOKENS):
                place = token(made.layout, cache, kv, slot)
                place.copy_(mine[kv, i, slot].view(place.dtype).view_as(place))
    return made


def bounds(tp: int, pp: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Layers and heads of each worker of an engine."""
    stage, each = LAYERS // pp, HEADS // tp
    return [
        ((p * stage, p * stage + stage), (t * each, t * each + each))
        for p in range(pp) for t in range(tp)
    ]  # fmt: skip


class Workers:
    """The pipelines of one engine's workers."""

    def __init__(
        self, opened: Open, source: Any, whole: Engine, tp: int, pp: int, order: str = "2BNHD"
    ) -> None:
        self.shares = bounds(tp, pp)
        self.engines = [cut(whole, *share, order) for share in self.shares]
        self.pipes: list[Any] = [
            opened(source, engine, layers=layers, heads=heads)
            for engine, (layers, heads) in zip(self.engines, self.shares, strict=True)
        ]
        chain = Chain(self.pipes[0].whole(LAYERS, HEADS).digest, 16)
        chain.extend(IDS)
        self.span = chain.span(0, len(chain.links))
        self.chunks = [b"".join(chain.links[i : i + 4]) for i in range(0, len(chain.links), 4)]

    def know_each_other(self) -> Workers:
        ranks = [rank for pipe in self.pipes for rank in pipe.handoff.ranks]
        for pipe in self.pipes:
            pipe.handoff.ranks[:] = ranks
        return self

    def promise(self) -> None:
        for pipe in self.pipes:
            pipe.handoff.promise(TICKET, self.chunks)

    def store(self) -> None:
        for pipe, engine in zip(self.pipes, self.engines, strict=True):
            assert pipe.store(self.span, engine.caches, AT).wait().lost == {}

    def land(self, at: Workers, *, later: bool = False) -> list[int]:
        """What each lands of what the other engine has, whose first worker alone is named."""
        port = int(at.pipes[0].serves_at.rpartition(":")[2])
        begun = [
            pipe.handoff.land("127.0.0.1", port, TICKET, self.chunks, later=later)
            for pipe in self.pipes
        ]
        came = [each.result(30) for each in begun]
        for pipe in self.pipes:
            settle(pipe)
        return came

    def check(self, whole: Engine) -> None:
        """All is here, and is what one engine would have that holds all."""
        for pipe, engine, share in zip(self.pipes, self.engines, self.shares, strict=True):
            right = cut(whole, *share, engine.order)
            for tensor in engine.flat:
                tensor.fill_(7.0)
            got = pipe.retrieve(self.span, engine.caches, AT).wait()
            assert (got.tokens, got.lost) == (TOKENS, {})
            assert torch.equal(engine.rows(AT), right.rows(AT))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ((2, 1), (2, 1)), ((1, 2), (1, 2)), ((1, 1), (2, 1)), ((2, 1), (1, 1)), ((4, 1), (2, 1)),
        ((2, 1), (4, 1)), ((1, 2), (1, 1)), ((1, 1), (1, 3)), ((1, 2), (1, 3)), ((2, 2), (1, 1)),
        ((1, 1), (4, 3)), ((1, 3), (2, 2)),
    ],
)  # fmt: skip
def test_what_one_engines_workers_have_another_ones_get(
    opened: Open, whole: Engine, theirs: tuple[int, int], ours: tuple[int, int]
) -> None:
    p = Workers(opened, prefiller(order="canonical"), whole, *theirs).know_each_other()
    d = Workers(opened, decoder(order="canonical", chunk__group=3), whole, *ours, "BHNC")
    assert d.chunks == p.chunks
    p.promise()
    p.store()
    assert d.land(p) == [3] * len(d.pipes)
    for pipe in p.pipes:
        if ours[0] >= theirs[0] and ours[1] >= theirs[1]:  # each has been asked by all who would
            until(lambda pipe=pipe: pipe.stats()["handoff"]["tickets"] == 0)
    d.check(whole)
    assert d.land(p) == [0] * len(d.pipes)  # it is here


def test_shares_are_joined_while_they_are_computed(opened: Open, whole: Engine) -> None:
    p = Workers(opened, prefiller(), whole, 2, 1).know_each_other()
    d = Workers(opened, decoder(), whole, 1, 1)
    port = int(p.pipes[0].serves_at.rpartition(":")[2])
    landing = d.pipes[0].handoff.land("127.0.0.1", port, TICKET, d.chunks, later=True)
    until(lambda: all(pipe.stats()["serve"]["clients"] for pipe in p.pipes))
    p.promise()
    p.store()
    assert landing.result(30) == 3
    d.check(whole)


def test_a_worker_that_is_dead_or_unknown_costs_a_miss(opened: Open, whole: Engine) -> None:
    p = Workers(opened, prefiller(), whole, 2, 1)
    d = Workers(opened, decoder(handoff={"wait": "500 ms"}), whole, 1, 1)
    p.store()
    assert d.land(p) == [0]  # of its other workers it was not told yet
    p.know_each_other()
    p.pipes[1].close()
    assert d.land(p) == [0]
    assert d.pipes[0].stats()["tiers"]["hot"]["objects"] == 0


def test_one_worker_that_has_less_is_joined_as_far_as_that(opened: Open, whole: Engine) -> None:
    p = Workers(opened, prefiller(), whole, 2, 1).know_each_other()
    d = Workers(opened, decoder(), whole, 1, 1)
    p.store()
    p.pipes[1].clear()
    links = p.span._replace(links=p.span.links[: 8 * 32], tokens=128)  # two of its chunks
    p.pipes[1].store(links, p.engines[1].caches, AT[:128]).wait()
    assert d.land(p) == [2]


def test_shares_of_another_model_or_that_are_encoded_are_not_joined(
    opened: Open, whole: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    p = Workers(opened, prefiller(), whole, 2, 1).know_each_other()
    d = Workers(opened, decoder(), whole, 1, 1)
    p.store()
    ranks = p.pipes[0].handoff.ranks
    ranks[1] = ranks[1]._replace(space=bytes(32))
    assert d.land(p) == [0]
    encoding = prefiller()
    stages = encoding["graphs"]["store"]["stages"]
    del stages["hot"]
    stages |= {"host": {"use": "to_host"}, "small": {"use": "zstd"}}
    stages["hot"] = {"use": "put", "tier": "hot"}
    encoded = Workers(opened, encoding, whole, 2, 1).know_each_other()
    encoded.store()
    for _ in range(2):
        assert d.land(encoded) == [0]
    assert d.pipes[0].stats()["tiers"]["hot"]["objects"] == 0
    said = [r.getMessage() for r in caplog.records if "without a codec" in r.getMessage()]
    assert len(said) == 1


GEOMETRY = Geometry(2, LAYERS, HEADS, 8, "bfloat16", 1)
NAMES = Namespace(model="m", geometry=str(GEOMETRY), layers=(0, LAYERS), heads=(0, HEADS))


def of(layers: tuple[int, int], heads: tuple[int, int]) -> OwnShare:
    from dataclasses import replace

    geometry = replace(GEOMETRY, layers=layers[1] - layers[0], heads=heads[1] - heads[0])
    names = replace(NAMES, geometry=str(geometry), layers=layers, heads=heads)
    return OwnShare(names, geometry)


def test_shares_that_leave_a_gap_or_overlap_are_no_sources() -> None:
    own = of((0, 6), (0, 4))
    halves = [of((0, 6), (0, 2)).at("a"), of((0, 6), (2, 4)).at("b")]
    assert [s.rank.address for s in own.sources(halves)] == ["a", "b"]
    assert own.sources(halves[:1]) == []
    assert own.sources([*halves, own.at("c")])[0].rank.address == "c"
    twins = [halves[0], halves[0]._replace(address="twin"), halves[1]]
    assert [s.rank.address for s in own.sources(twins)] == ["a", "b"]
    apart = [of((0, 6), (0, 3)).at("a"), of((0, 6), (2, 4)).at("b")]
    assert own.sources(apart) == []
    assert [s.askers for s in of((0, 3), (0, 1)).sources([own.at("x")])] == [8]
    assert own.sources([]) == []


def test_ranks_on_the_wire() -> None:
    ranks = [of((0, 6), (0, 2)).at("tierloom://h:1"), of((0, 6), (2, 4)).at("")]
    body = pack_ranks(ranks)
    assert unpack_ranks(body) == ranks
    assert unpack_ranks(b"") == []
    for end in range(1, len(body)):
        if end != len(pack_ranks(ranks[:1])):
            with pytest.raises(BadMessage):
                unpack_ranks(body[:end])
    for bad in ((2, 2), (3, 1)):
        with pytest.raises(BadMessage, match="contradicts"):
            unpack_ranks(pack_ranks([RankShare(bytes(32), bad, (0, 1), "")]))
    with pytest.raises(BadMessage):
        unpack_ranks(pack_ranks(ranks) * 600)


def test_a_ticket_ends_with_the_last_who_asks(opened: Open) -> None:
    engine = Engine()
    pipe: Any = opened(prefiller(), engine)
    promises = pipe.handoff.promises
    promises.open(ticket_of("a"), [b"x" * 32])
    promises.taken(ticket_of("a"), 2)
    assert len(promises) == 1
    promises.taken(ticket_of("a"), 2)
    assert len(promises) == 0
