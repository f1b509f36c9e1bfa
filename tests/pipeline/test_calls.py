"""What is called beside store and retrieve, from coroutines, with wrong input, after the end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import Engine, config, settle, tokens, with_disk

from tierloom import Closed, ConfigError, InputError, LayoutError, Lost, TierDown

if TYPE_CHECKING:
    from conftest import Open


def same(a: Engine, sa: np.ndarray, b: Engine, sb: np.ndarray) -> bool:
    return not len(sa) or torch.equal(a.rows(sa), b.rows(sb))


def test_async_twins(opened: Open) -> None:
    engine = Engine()
    pipe, target, ids = opened(config(), engine), engine.blank(), tokens(150)
    at, to = engine.slots(150), target.slots(150)

    async def life() -> None:
        assert (await pipe.astore(ids, engine.caches, at)).tokens == 150
        assert await pipe.alookup(ids) == 150
        assert (await pipe.aretrieve(ids, target.caches, to)).tokens == 150

    asyncio.run(life())
    assert same(engine, at, target, to)


def test_async_twins_on_trio(opened: Open) -> None:
    trio = pytest.importorskip("trio")
    engine = Engine()
    pipe, ids = opened(config(), engine), tokens(64)
    assert trio.run(lambda: pipe.astore(ids, engine.caches, engine.slots(64))).tokens == 64
    assert trio.run(lambda: pipe.alookup(ids)) == 64


def test_a_cancelled_coroutine_gives_its_request_up(opened: Open) -> None:
    engine = Engine(layers=4)
    slow = {"use": "slow", "capacity": "8 MiB", "delay": "2 s"}
    pipe = opened(config(tiers__hot=slow), engine)

    async def life() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pipe.astore(tokens(64), engine.caches, engine.slots(64)), 0.05)

    asyncio.run(life())
    settle(pipe)


def test_wrong_input_is_named_before_memory_is_touched(opened: Open) -> None:
    engine = Engine()
    pipe, blank, ids = opened(config(), engine), engine.blank(), tokens(32)
    good = engine.slots(32)
    pipe.store(ids, engine.caches, good).wait()
    wrong = [
        (lambda: pipe.retrieve(ids, blank.caches, good[:31]), InputError, "31 slots for 32"),
        (lambda: pipe.retrieve(ids, blank.caches, good + 10_000), InputError, "outside"),
        (lambda: pipe.retrieve(ids, blank.caches, -good), InputError, "outside"),
        (lambda: pipe.retrieve(ids, blank.caches), InputError, "slots= or blocks="),
        (
            lambda: pipe.retrieve(ids, blank.caches, good, blocks=[1]),
            InputError,
            "slots= or blocks=",
        ),
        (lambda: pipe.retrieve(ids.astype(float), blank.caches, good), InputError, "integers"),
        (lambda: pipe.retrieve(ids[None], blank.caches, good), InputError, "1-D"),
        (lambda: pipe.retrieve(ids, blank.caches[:-1], good), LayoutError, "5 layers given"),
        (
            lambda: pipe.retrieve(ids, [c.float() for c in blank.caches], good),
            LayoutError,
            "layer 0",
        ),
        (
            lambda: pipe.retrieve(ids, [c[:, :-1] for c in blank.caches], good),
            LayoutError,
            "layer 0",
        ),
        (
            lambda: pipe.retrieve(ids, (e := Engine(heads=3)).caches, good, layout=e.layout),
            LayoutError,
            "this pipeline keeps",
        ),
    ]
    for call, kind, says in wrong:
        with pytest.raises(kind, match=says):
            call()
    assert blank.untouched(np.array([], int))
    assert pipe.stats()["graphs"]["retrieve"]["open"] == 0


def test_another_layout_of_the_same_geometry_may_be_given(opened: Open) -> None:
    engine, other = Engine("2BNHD"), Engine("BHND", block=200, blocks=1).blank()
    pipe, ids = opened(config(), engine), tokens(150)
    at, to = engine.slots(150), np.arange(150)
    pipe.store(ids, engine.caches, at).wait()
    assert pipe.retrieve(ids, other.caches, to, layout=other.layout).wait().tokens == 150
    assert same(engine, at, other, to)


def test_a_layout_that_fails_its_self_test_turns_caching_off(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tierloom.stages.kv.layout import KVLayout as Layout

    engine = Engine()
    real = Layout.planes

    def swapped(self: Layout, caches: list, *, native: bool = False) -> Any:
        table = real(self, caches, native=native)
        table.base[:] = table.base[::-1].copy()
        table.stride[:, 1] += 16
        return table

    monkeypatch.setattr(Layout, "planes", swapped)
    pipe = opened(config(), engine)
    got = pipe.store(tokens(64), engine.caches, engine.slots(64)).wait()
    assert (got.tokens, got.lost) == (0, {Lost.BAD_LAYOUT: 1})
    assert pipe.retrieve(tokens(64), engine.caches, engine.slots(64)).wait().tokens == 0
    assert pipe.lookup(tokens(64)) == 0
    assert len([r for r in caplog.records if "caching is off" in r.getMessage()]) == 1


def test_native_order_needs_chunks_of_whole_blocks(opened: Open) -> None:
    with pytest.raises(ConfigError, match="multiple of the"):
        opened(config(order="native"), Engine("BHND", block=48, blocks=4))


def test_who_shares_with_sglang_keeps_no_native_blocks(opened: Open) -> None:
    for keys, native in (("own", True), ("sglang", False)):
        pipe = opened(config(order="auto", chunk__keys=keys), Engine("BHND"))
        assert pipe.native == native


def test_pins_clear_and_stats(opened: Open) -> None:
    engine = Engine(layers=6, heads=8, dim=64)
    pipe = opened(config(tiers__hot__capacity="6 MiB", tiers__hot__evict="lru"), engine)
    ids = [tokens(64, seed=s) for s in range(20)]
    at = engine.slots(64)
    pipe.store(ids[0], engine.caches, at).wait()
    assert pipe.pin(ids[0]) == 1
    for i in ids[1:]:
        pipe.store(i, engine.caches, at).wait()
    assert pipe.lookup(ids[0]) == 64
    assert pipe.lookup(ids[1]) == 0
    hot = pipe.stats()["tiers"]["hot"]
    assert hot["evicted"] > 0
    assert hot["nbytes"] <= 6 << 20
    assert pipe.pin(ids[0], pinned=False) == 1
    assert pipe.clear() == hot["objects"]
    assert pipe.lookup(ids[0]) == 0


def test_clear_gives_up_stores_and_names_who_refuses(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    pipe = opened(with_disk(tmp_path), engine)
    ids, at = tokens(128), engine.slots(128)
    pipe.store(ids, engine.caches, at).wait()
    wave = pipe.begin_store(tokens(128, seed=1), engine.caches, at)  # the model never goes on
    assert pipe.clear(local=True) == 4, "two chunks in two tiers"
    assert wave.wait(5).lost, "it was given up, not waited for"
    assert (pipe.lookup(ids), pipe.lookup(tokens(128, seed=1))) == (0, 0)
    pipe.store(ids, engine.caches, at).wait()

    async def refuse() -> int:
        raise OSError("read-only")

    monkeypatch.setattr(pipe.tiers["warm"].tier, "clear", refuse)
    with pytest.raises(TierDown, match=r"not cleared: warm \(tier_down\)"):
        pipe.clear()
    assert len(pipe.tiers["hot"].tier._index) == 0, "the others have done it"


def test_closed_is_closed(opened: Open) -> None:
    engine = Engine()
    pipe = opened(config(), engine)
    pipe.close()
    pipe.close()
    for call in (lambda: pipe.lookup([1]), lambda: pipe.store([1], engine.caches, [0]), pipe.clear):
        with pytest.raises(Closed):
            call()


def test_worth_decides_by_what_was_measured(opened: Open, tmp_path: Path) -> None:
    engine = Engine()
    slow = {"use": "slow", "capacity": "8 MiB", "delay": "50 ms"}
    pipe, ids = opened(config(tiers__hot=slow), engine), tokens(128)
    at = engine.slots(128)
    pipe.store(ids, engine.caches, at).wait()
    assert pipe.retrieve(ids, engine.caches, at).wait().tokens == 128  # nothing measured yet: load
    pipe.note_prefill(1_000_000, 1.0)  # computing 128 tokens would take 0.1 ms
    assert pipe.retrieve(ids, engine.caches, at).wait().tokens == 0
    pipe.prefill_rate = 0.0
    pipe.note_prefill(100, 1.0)
    assert pipe.retrieve(ids, engine.caches, at).wait().tokens == 128
