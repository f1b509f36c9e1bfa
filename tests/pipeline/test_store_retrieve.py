"""What is stored comes back, byte for byte, and nothing else does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import SHAPES, Engine, config, settle, tokens, with_disk

from tierloom import Lost

if TYPE_CHECKING:
    from conftest import Open


def same(a: Engine, sa: np.ndarray, b: Engine, sb: np.ndarray) -> bool:
    return not len(sa) or torch.equal(a.rows(sa), b.rows(sb))


@pytest.mark.parametrize("order", list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
def test_every_layout_comes_back(opened: Open, order: str, dtype: torch.dtype) -> None:
    engine = Engine(order, dtype=dtype)
    pipe, target, ids = opened(config(), engine), engine.blank(), tokens(200)
    if pipe.native:
        ids = ids[:192]
    at, to = engine.slots(len(ids)), target.slots(len(ids))
    stored = pipe.store(ids, engine.caches, at).wait()
    assert (stored.tokens, stored.lost, stored.tiers) == (len(ids), {}, {"hot": -(-len(ids) // 64)})
    assert pipe.lookup(ids) == len(ids)
    got = pipe.retrieve(ids, target.caches, to).wait()
    assert (got.tokens, got.lost) == (len(ids), {})
    assert same(engine, at, target, to)
    assert target.untouched(to)


@pytest.mark.parametrize("order", ["2BHND", "BHND", "BHNC", "BHNC-KT", "2BNHD"])
@pytest.mark.parametrize("kept", ["native", "canonical"])
def test_native_and_canonical_order(opened: Open, order: str, kept: str) -> None:
    engine = Engine(order)
    pipe, target, ids = opened(config(order=kept), engine), engine.blank(), tokens(200)
    assert pipe.native == (kept == "native")
    at, to = engine.slots(200), target.slots(200)
    whole = 192 if kept == "native" else 200  # a started block cannot be kept as a block
    assert pipe.store(ids, engine.caches, at).wait().tokens == whole
    assert pipe.retrieve(ids, target.caches, to).wait().tokens == whole
    assert same(engine, at[:whole], target, to[:whole])
    assert target.untouched(to[:whole])


def test_canonical_bytes_are_shared_by_engines_of_different_layout(
    opened: Open, tmp_path: Path
) -> None:
    one, other = Engine("2BNHD", block=16), Engine("BHND", block=32, blocks=20).blank()
    source = with_disk(tmp_path, order="canonical")
    ids, at, to = tokens(150), one.slots(150), other.slots(150)
    first = opened(source, one)
    first.store(ids, one.caches, at).wait()
    settle(first)
    first.close()
    second = opened(source, other)
    assert second.retrieve(ids, other.caches, to).wait().tokens == 150
    assert same(one, at, other, to)


@pytest.mark.parametrize("where", ["memory", "disk", "restart"])
@pytest.mark.parametrize(
    ("leaves", "common"), [(0, 0), (10, 0), (16, 16), (100, 96), (129, 128), (199, 192)]
)
def test_a_prompt_that_leaves_a_kept_one_hits_up_to_the_last_common_grain(
    opened: Open, tmp_path: Path, where: str, leaves: int, common: int
) -> None:
    engine = Engine()
    target = engine.blank()
    source = with_disk(tmp_path)
    ids = tokens(200)
    at, to = engine.slots(200), target.slots(220)
    pipe = opened(source, engine)
    pipe.store(ids, engine.caches, at).wait()
    if where != "memory":
        settle(pipe)
        if where == "disk":
            pipe._portal.call(pipe.tiers["hot"].clear)
        else:
            pipe.close()
            pipe = opened(source, engine)
    fork = np.concatenate([ids[:leaves], tokens(220 - leaves, seed=9)]).astype(np.int32)
    assert pipe.lookup(fork) == common
    got = pipe.retrieve(fork, target.caches, to).wait()
    assert (got.tokens, got.lost) == (common, {})
    assert same(engine, at[:common], target, to[:common])
    assert target.untouched(to[:common])


def test_a_longer_prompt_goes_on_from_the_kept_tail(opened: Open) -> None:
    engine = Engine()
    pipe, ids = opened(config(), engine), tokens(300)
    at = engine.slots(300)
    pipe.store(ids[:150], engine.caches, at[:150]).wait()
    assert [pipe.lookup(ids[:n]) for n in (150, 149, 144, 300)] == [150, 144, 144, 144]
    assert pipe.store(ids, engine.caches, at).wait().tokens == 300
    assert pipe.lookup(ids) == 300
    assert pipe.lookup(ids[:150]) >= 144


@pytest.mark.parametrize("group", [1, 2, 4, 100])
@pytest.mark.parametrize("by", ["request", "layer"])
@pytest.mark.parametrize("use", [None, "zstd"])
def test_objects_cut_into_other_layer_groups_are_read(
    opened: Open, tmp_path: Path, group: int, by: str, use: str | None
) -> None:
    engine = Engine()
    target, ids, at = engine.blank(), tokens(150), engine.slots(150)
    source = with_disk(tmp_path, chunk__group=3)
    if use:
        stages = source["graphs"]["store"]["stages"]
        stages |= {"host": {"use": "to_host", "from": "pack"}, "small": {"use": use}}
        stages["warm"] = stages.pop("warm") | {"from": "small"}
    pipe = opened(source, engine)
    pipe.store(ids, engine.caches, at).wait()
    settle(pipe)
    pipe.close()
    pipe = opened(
        with_disk(tmp_path, chunk__group=group, graphs__retrieve__pace={"by": by}), engine
    )
    for _ in range(2):  # from disk, then as it was promoted
        wave = pipe.begin_retrieve(ids, target.caches, at)
        assert [wave.wait_layer(i) for i in range(engine.layers)] == [150] * engine.layers
        assert wave.wait().tokens == 150
        assert same(engine, at, target, at)
        settle(pipe)


def test_without_partial_only_whole_chunks_are_kept(opened: Open) -> None:
    engine = Engine()
    pipe, ids = opened(config(chunk__partial=False), engine), tokens(100)
    pipe.store(ids, engine.caches, engine.slots(100)).wait()
    assert pipe.lookup(ids) == 64


@pytest.mark.parametrize("use", ["zstd", "lz4"])
@pytest.mark.parametrize("layered", [False, True])
def test_encoded_branches(opened: Open, tmp_path: Path, use: str, layered: bool) -> None:
    """Plain in memory, encoded on disk; any config reads it; promotion keeps it as it was read."""
    engine = Engine(dim=64)
    for t in engine.flat:  # something that compresses
        t.copy_(t.round())
    source = with_disk(
        tmp_path, graphs__store__pace={"by": "layer"}, graphs__retrieve__pace={"by": "layer"}
    )
    stages = source["graphs"]["store"]["stages"]
    del stages["warm"]
    stages |= {
        "host": {"use": "to_host", "from": "pack"},
        "shrink": {"use": use},
        "warm": {"use": "put", "tier": "warm", "when_full": "block"},
    }
    pipe, target, ids = opened(source, engine), engine.blank(), tokens(200)
    at, to = engine.slots(200), target.slots(200)
    if layered:
        ticket = pipe.begin_store(ids, engine.caches, at)
        for i in range(engine.layers):
            ticket.layer_done(i)
    else:
        ticket = pipe.store(ids, engine.caches, at)
    assert ticket.wait().tiers == {"hot": 4, "warm": 4}
    settle(pipe)
    tiers = pipe.stats()["tiers"]
    assert tiers["warm"]["bytes_in"] < 0.8 * tiers["hot"]["bytes_in"]
    pipe._portal.call(pipe.tiers["hot"].clear)
    for delivered in ({"warm": 4}, {"hot": 4}):
        target = engine.blank()
        if layered:
            ticket = pipe.begin_retrieve(ids, target.caches, to)
            assert [ticket.wait_layer(i) for i in range(engine.layers)] == [200] * engine.layers
        else:
            ticket = pipe.retrieve(ids, target.caches, to)
        got = ticket.wait()
        assert (got.tokens, got.tiers) == (200, delivered)
        assert same(engine, at, target, to)
        settle(pipe)


def test_tenants_do_not_meet(opened: Open) -> None:
    engine = Engine()
    pipe, ids = opened(config(), engine), tokens(64)
    pipe.store(ids, engine.caches, engine.slots(64), salt="a", adapter="l", tags={"t": "1"}).wait()
    assert pipe.lookup(ids, salt="a", adapter="l", tags={"t": "1"}) == 64
    for names in (
        {},
        {"salt": "a"},
        {"salt": "b", "adapter": "l", "tags": {"t": "1"}},
        {"salt": "a", "adapter": "l"},
    ):
        assert pipe.lookup(ids, **names) == 0
        assert pipe.retrieve(ids, engine.caches, engine.slots(64), **names).wait().tokens == 0


@pytest.mark.parametrize(
    "other",
    [{"model": "b"}, {"weights": "w"}, {"rope": "r"}, {"heads": (2, 4)}, {"layers": (6, 12)}],
)
def test_models_do_not_meet(opened: Open, tmp_path: Path, other: dict[str, Any]) -> None:
    engine, ids = Engine(), tokens(64)
    pipe = opened(with_disk(tmp_path), engine)
    pipe.store(ids, engine.caches, engine.slots(64)).wait()
    settle(pipe)
    pipe.close()
    assert opened(with_disk(tmp_path), engine, **other).lookup(ids) == 0


def test_layer_by_layer(opened: Open) -> None:
    engine = Engine(layers=7)
    pace = {"by": "layer", "window": 1}
    pipe = opened(config(graphs__store__pace=pace, graphs__retrieve__pace=pace), engine)
    target, ids = engine.blank(), tokens(200)
    at, to = engine.slots(200), target.slots(200)
    wave = pipe.begin_store(ids, engine.caches, at)
    for i in range(engine.layers):
        assert pipe.lookup(ids) == 0, "visible before it was whole"
        wave.layer_done(i)
    assert wave.captured()
    assert wave.wait().tokens == 200
    wave = pipe.begin_retrieve(ids, target.caches, to)
    assert wave.planned() == 200
    for i in range(engine.layers):
        assert wave.wait_layer(i) == 200
        here = target.rows(to)[:, : i + 1]
        assert torch.equal(here, engine.rows(at)[:, : i + 1])
    assert wave.wait().tokens == 200
    assert target.untouched(to)


@pytest.mark.parametrize("layers", [5, 6, 7, 8])
@pytest.mark.parametrize("by", ["layer", "request"])
def test_no_layer_is_read_before_it_is_done(opened: Open, layers: int, by: str) -> None:
    """The model fills its cache layer by layer, and each as late as it may."""
    truth = Engine(layers=layers)
    engine = truth.blank()
    pipe = opened(config(chunk__group=3, graphs__store__pace={"by": by}), engine)
    ids, at = tokens(130), engine.slots(130)
    wave = pipe.begin_store(ids, engine.caches, at)
    for i in range(layers):
        time.sleep(0.01)  # a copy that comes too early has the time to
        engine.caches[i].copy_(truth.caches[i])
        wave.layer_done(i)
    assert wave.wait().tokens == 130
    target = truth.blank()
    assert pipe.retrieve(ids, target.caches, at).wait().tokens == 130
    assert same(truth, at, target, at)


def test_a_deadline_bounds_the_waiting_not_the_computing(opened: Open) -> None:
    """A model that takes longer than the deadline between two layers still gets all of its KV."""
    engine = Engine(layers=4)
    pace = {"by": "layer", "window": 1}
    source = config(graphs__store__pace=pace, graphs__retrieve__pace=pace)
    source["graphs"]["store"]["deadline"] = source["graphs"]["retrieve"]["deadline"] = "500 ms"
    pipe, ids, at = opened(source, engine), tokens(64), engine.slots(64)
    wave = pipe.begin_store(ids, engine.caches, at)
    for i in range(engine.layers):
        time.sleep(0.3)
        wave.layer_done(i)
    assert wave.wait(5).tokens == 64
    wave = pipe.begin_retrieve(ids, engine.blank().caches, at)
    for i in range(engine.layers):
        time.sleep(0.3)
        assert wave.wait_layer(i) == 64
    assert wave.wait().tokens == 64


def test_a_model_that_has_gone_is_given_up(opened: Open) -> None:
    engine = Engine()
    pipe = opened(config(graphs__store__pace={"by": "layer", "idle": "100 ms"}), engine)
    wave = pipe.begin_store(tokens(64), engine.caches, engine.slots(64))
    wave.layer_done(0)
    assert wave.future.result(5).lost == {Lost.LATE: 1}


def test_a_wave_stays_within_its_window(opened: Open) -> None:
    """Nothing is placed further ahead of the model than the graph says."""
    engine = Engine(layers=12)
    pipe = opened(config(graphs__retrieve__pace={"by": "layer", "window": 2}), engine)
    target, ids = engine.blank(), tokens(64)
    at, to = engine.slots(64), target.slots(64)
    pipe.store(ids, engine.caches, at).wait()
    wave = pipe.begin_retrieve(ids, target.caches, to)
    gates = wave._request.gates
    assert gates.wait(1, 5)  # two groups of two layers are ahead of a model that has not begun
    assert not gates.wait(2, 0.05)
    assert (target.rows(to)[:, 4:] == 0xA5).all()
    wave.wait_layer(0)
    assert gates.wait(2, 5)
    assert not gates.wait(3, 0.05)
    for i in range(12):
        wave.wait_layer(i)
    assert wave.wait().tokens == 64


@pytest.mark.parametrize("evict", ["lru", "fifo", "s3-fifo", "arc"])
def test_a_prompt_larger_than_the_tier_keeps_its_head(
    opened: Open, tmp_path: Path, evict: str
) -> None:
    engine = Engine(blocks=200, heads=8, dim=64)
    source = with_disk(tmp_path, tiers__hot__evict=evict)
    source["tiers"]["warm"] |= {"capacity": "16 MiB", "evict": evict}
    pipe, ids = opened(source, engine), tokens(2500)
    got = pipe.store(ids, engine.caches, engine.slots(2500)).wait()
    assert got.lost[Lost.NO_ROOM] > 0
    settle(pipe)
    for name in ("hot", "warm"):
        stat = pipe.stats()["tiers"][name]
        assert stat["nbytes"] > 0.9 * (16 << 20)
        assert stat["evicted"] == 0
        assert pipe.lookup(ids) == stat["objects"] * 64


def test_requests_of_any_size_share_a_small_arena(opened: Open) -> None:
    engine = Engine(layers=6, blocks=600, heads=8, dim=64)
    pipe = opened(config(tiers__hot__capacity="256 MiB"), engine)
    ids = [tokens(2000, seed=s) for s in range(4)]
    at = engine.slots(2000)
    receipts = [t.wait(20) for t in [pipe.store(i, engine.caches, at) for i in ids]]
    assert [r.tokens for r in receipts] == [2000] * 4


@pytest.mark.parametrize("by", ["layer", "request"])
def test_many_stores_behind_a_model_share_a_small_arena(opened: Open, by: str) -> None:
    """None may hold half of what two wait for; by request even a prompt larger than it fits."""
    engine = Engine(layers=6, blocks=600, heads=8, dim=64)
    source = config(tiers__hot__capacity="256 MiB", graphs__store__pace={"by": by})
    pipe, at = opened(source, engine), engine.slots(3000)
    n = 3000 if by == "request" else 128
    waves = [pipe.begin_store(tokens(n, seed=s), engine.caches, at[:n]) for s in range(12)]
    for i in range(engine.layers):
        for wave in waves:
            wave.layer_done(i)
    assert [w.wait(20).tokens for w in waves] == [n] * 12


def test_blocks_instead_of_slots(opened: Open) -> None:
    engine = Engine()
    pipe, ids = opened(config(), engine), tokens(40)
    assert pipe.store(ids, engine.caches, blocks=torch.tensor([3, 0, 7])).wait().tokens == 40
    target = engine.blank()
    assert pipe.retrieve(ids, target.caches, blocks=[1, 2, 5]).wait().tokens == 40
    at = [*range(48, 64), *range(16), *range(112, 120)]
    assert torch.equal(
        engine.rows(np.array(at)), target.rows(np.array([*range(16, 48), *range(80, 88)]))
    )


def test_an_empty_prompt_is_nobodys_business(opened: Open) -> None:
    engine = Engine()
    pipe = opened(config(), engine)
    assert pipe.store([], engine.caches, []).wait().tokens == 0
    assert pipe.retrieve([], engine.caches, []).wait().tokens == 0
    assert pipe.lookup([]) == 0
