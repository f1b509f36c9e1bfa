"""The engine's own cache is not ours to write: not by a self-test, not by two at once."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strides
import torch
from conftest import Engine, Open, config, tokens

from tierloom import KVLayout, LayoutError, Lost
from tierloom.stages.kv import layout_check as selftest

CASES = list(strides.cases())


def made(order: str, way: str) -> tuple[KVLayout, list[Any], torch.Tensor]:
    raw = torch.from_numpy(
        np.random.default_rng(0).integers(0, 99, strides.words(order, way), np.int16)
    )
    return *strides.caches(order, way, raw), raw


@pytest.mark.slow
def test_neither_opening_nor_storing_writes_a_byte() -> None:
    """Every order and way of laying out, over pages that may not be written."""
    child = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(Path(strides.__file__))],
        capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert not child.returncode, child.stderr[-2000:]
    assert child.stdout.splitlines() == [f"{order} {way}" for order, way in CASES]


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("given", [False, True], ids=["its own layout", "another layout"])
def test_first_requests_may_come_at_once(opened: Open, threads: int, given: bool) -> None:
    for turn in range(5):
        engine = Engine(layers=8, blocks=80, seed=turn)
        before = [t.clone() for t in engine.flat]
        pipe = opened(config(), engine)
        layout = replace(engine.layout) if given else None
        meet = threading.Barrier(threads)
        kept: list[int] = []

        def go(i: int, pipe: Any, engine: Engine, layout: Any, meet: Any, kept: Any) -> None:
            meet.wait(10)
            ids = tokens(512, seed=i)
            kept.append(pipe.store(ids, engine.caches, np.arange(512), layout=layout).wait().tokens)

        at_once = [
            threading.Thread(target=go, args=(i, pipe, engine, layout, meet, kept))
            for i in range(threads)
        ]
        for t in at_once:
            t.start()
        while any(t.is_alive() for t in at_once):
            assert all(map(torch.equal, engine.flat, before)), "the engine's cache was changed"
        assert pipe.off is None
        assert kept == [512] * threads
        assert all(map(torch.equal, engine.flat, before))


@pytest.mark.parametrize("fails", [False, True])
def test_a_layout_is_tested_once_and_all_wait_for_it(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    engine, other = Engine("2BNHD"), Engine("BHND")
    pipe = opened(config(order="canonical"), engine)
    begun, go, tested = threading.Event(), threading.Event(), []

    def slow(layout: KVLayout, *, native: bool) -> None:
        tested.append(layout.order)
        begun.set()
        assert go.wait(10)
        if fails:
            raise LayoutError("BHND: not as it was")

    monkeypatch.setattr(selftest, "check_layout", slow)
    got: list[Any] = []

    def ask(seed: int) -> None:
        ids, slots = tokens(64, seed), np.arange(64)
        got.append(pipe.store(ids, other.caches, slots, layout=other.layout).wait())

    with caplog.at_level(logging.ERROR, "tierloom"):
        askers = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for t in askers:
            t.start()
        assert begun.wait(10)
        for t in askers:
            t.join(0.05)
        assert not got, "a request went on before its layout had been tested"
        go.set()
        for t in askers:
            t.join(10)
    assert tested == ["BHND"]
    assert [r.lost for r in got] == [{Lost.BAD_LAYOUT: 1} if fails else {}] * 3
    assert pipe.off == ("BHND: not as it was" if fails else None)
    assert caplog.messages == (["caching is off: BHND: not as it was"] if fails else [])


def test_a_self_test_that_breaks_turns_caching_off(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device without memory, a kernel that does not compile: the engine goes on without us."""

    def broken(layout: KVLayout, *, native: bool) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(selftest, "check_layout", broken)
    with caplog.at_level(logging.ERROR, "tierloom"):
        engine = Engine()
        pipe = opened(config(), engine)
        assert pipe.store(tokens(64), engine.caches, engine.slots(64)).wait().tokens == 0
    assert "CUDA out of memory" in (pipe.off or "")
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("order", "way"), CASES)
def test_a_look_alike_is_laid_out_as_the_engine_does(order: str, way: str) -> None:
    layout, layers, raw = made(order, way)
    before = raw.clone()
    few = selftest.fewer(layout)
    assert selftest.fewer(few) == few
    assert (few.order, few.dtype) == (order, "bfloat16")
    assert (few.heads, few.dim, few.block_tokens) == (layout.heads, layout.dim, strides.BLOCK)
    letters = order.removesuffix("-KT")
    for c, mine, theirs in zip(letters, few.stride, layout.stride, strict=True):
        assert mine == theirs or (c == "2" and 0 < mine < theirs and (theirs - mine) % 256 == 0)
    alike = selftest.look_alike(few, torch.zeros(selftest.memory_of(few), dtype=torch.uint8))
    few.check(alike)
    assert selftest.memory_of(few) <= 2 * len(raw)
    for native in (False, True) if layout.dense_blocks else (False,):
        selftest.check_layout(layout, native=native)
    assert torch.equal(raw, before)
    bigger = KVLayout.from_tensors(
        [tuple(map(twice, t)) if isinstance(t, tuple) else twice(t, order) for t in layers],
        order=order, block_tokens=strides.BLOCK if order == "SHD" else None,
    )  # fmt: skip
    if way == "plain":  # tested once for caches of any length
        assert selftest.fewer(bigger) == few


def twice(t: torch.Tensor, order: str = "") -> torch.Tensor:
    return torch.cat([t, t], dim=1 if order.startswith("2") else 0)


@pytest.mark.parametrize(
    ("order", "way", "letter"),
    [(order, way, c) for order, way in CASES for c in "BNSH" if c in order],
)
def test_a_wrong_stride_is_found(
    order: str, way: str, letter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block, token, head: whichever of them is not where it seems to be."""
    layout, _, _ = made(order, way)
    column = {"B": 0, "N": 1, "S": 1, "H": 2}[letter]
    real = KVLayout.planes

    def wrong(self: KVLayout, caches: Any, *, native: bool = False) -> Any:
        table = real(self, caches, native=native)
        table.stride[:, column] -= table.itemsize  # less: what is wrong stays in our own memory
        return table

    monkeypatch.setattr(KVLayout, "planes", wrong)
    with pytest.raises(LayoutError):
        selftest.check_layout(layout, native=False)
    if letter == "B" and layout.dense_blocks:
        with pytest.raises(LayoutError):
            selftest.check_layout(layout, native=True)


@pytest.mark.parametrize("native", [False, True])
def test_a_stray_is_found(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """What is right in every row that was asked for, and wrong beside it."""
    layout, _, _ = made("BHNC", "together")
    real, memory = selftest.copy.scatter_now, []

    def remember(layout: KVLayout, made: torch.Tensor) -> list[Any]:
        memory.append(made)
        return alike(layout, made)

    def strays(*args: Any, **options: Any) -> None:
        real(*args, **options)
        memory[-1][gap] += 1

    alike, few = selftest.look_alike, selftest.fewer(layout)
    used = torch.zeros(selftest.memory_of(few), dtype=torch.uint8)
    for t in alike(few, used):
        t.view(torch.int16).fill_(-1)
    gap = int(torch.where(used == 0)[0][0])
    monkeypatch.setattr(selftest, "look_alike", remember)
    monkeypatch.setattr(selftest.copy, "scatter_now", strays)
    with pytest.raises(LayoutError, match="is not what was written"):
        selftest.check_layout(layout, native=native)


def test_tensors_that_share_memory_are_refused(opened: Open) -> None:
    one = torch.zeros(12, 16, 2, 8)
    for caches, order in (
        ([one, one], "BNHD"),
        ([(one, one), (one.clone(), one.clone())], "BNHD"),
        ([(one, one.clone()), (one.clone(), one)], "BNHD"),
    ):
        pairs = [c if isinstance(c, tuple) else (c, c) for c in caches]
        layout = KVLayout.from_tensors(pairs, order=order)
        pipe = opened(config(), type("E", (), {"layout": layout})())
        with pytest.raises(LayoutError, match="two of the tensors given begin at the same address"):
            pipe.store(tokens(64), pairs, np.arange(64))


@pytest.mark.parametrize("stride", [0, 8, 256 * 11])
def test_k_and_v_that_overlap_are_refused(stride: int) -> None:
    """However far apart: of a few blocks alone, the last would not be seen."""
    raw = torch.zeros(1 << 16)
    layer = raw.as_strided((2, 12, 16, 2, 8), (stride, 256, 16, 8, 1))
    layout = KVLayout.from_tensors([layer], order="2BNHD")
    with pytest.raises(LayoutError, match="two slots share memory"):
        selftest.check_layout(layout, native=False)


@pytest.mark.parametrize("name", ["B", "N", "H"])
def test_slots_that_overlap_are_refused(name: str) -> None:
    step = {"B": 256, "N": 16, "H": 8} | {name: 1}
    stride = (step["B"], step["N"], step["H"], 1)
    pair = tuple(torch.zeros(1 << 16).as_strided((12, 16, 2, 8), stride) for _ in range(2))
    layout = KVLayout.from_tensors([pair], order="BNHD")
    with pytest.raises(LayoutError, match="two slots share memory"):
        selftest.check_layout(layout, native=False)
