"""There and back: what is stored in a remote store, retrieved out of it, and compared."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from conftest import Engine, settle
from stores import IDS

if TYPE_CHECKING:
    from processes import Process

    from tierloom import Pipeline

PACES = ["request", "layer"]
PATIENCE = 5.0
"""Seconds, for limits of less than one: no test asserts on time, but a hang is a failure."""
SHORT: dict[str, Any] = {
    "graphs__store__deadline": "300 ms", "graphs__retrieve__deadline": "300 ms",
    "tiers__cold__timeout": "200 ms", "tiers__cold__fails": 2,
}  # fmt: skip
"""For what is to fail: a breaker that opens at the second call in vain."""
AMPLE = SHORT | {"graphs__store__deadline": "2 s", "graphs__retrieve__deadline": "2 s"}
"""The same, for what must come out of memory all the same: a store that is gone takes its own limit
of each request, and leaves time for the rest."""


def layered(pipe: Pipeline) -> bool:
    return pipe.spec.graphs["retrieve"].options.pace.by == "layer"


def same(engine: Engine, target: Engine, at: np.ndarray, n: int) -> bool:
    """The first `n` tokens are bit-equal in both."""
    pairs = zip(_bytes(engine), _bytes(target), strict=True)
    return all(np.array_equal(a[:, at[:n]], b[:, at[:n]]) for a, b in pairs)


def untouched(target: Engine, at: np.ndarray) -> bool:
    """Nothing but `at` was written of a blank engine."""
    others = np.setdiff1d(np.arange(target.blocks * target.block), at)
    return all(bool((t[:, others] == 0xA5).all()) for t in _bytes(target))


def _bytes(engine: Engine) -> list[np.ndarray]:
    """[kv, tokens, bytes of a token] of each layer."""
    assert engine.order == "2BNHD"
    flat = [t.view(torch.uint8).numpy() for t in engine.flat]
    return [t.reshape(2, engine.blocks * engine.block, -1) for t in flat]


def get(
    pipe: Pipeline, engine: Engine, at: np.ndarray, ids: np.ndarray = IDS, *,
    layer: Callable[[int], object] = lambda i: None, gone: bool = False,
) -> Any:  # fmt: skip
    """The receipt of a retrieve, by request or by layer as the graph goes, whose bytes were
    compared. `layer`: is called behind each layer. `gone`: nothing can have come, nor was placed.
    """
    target, began = engine.blank(), time.monotonic()
    if layered(pipe):
        ticket = pipe.begin_retrieve(ids, target.caches, at)
        for i in range(engine.layers):
            ticket.wait_layer(i)
            layer(i)
    else:
        ticket = pipe.retrieve(ids, target.caches, at)
    got = ticket.wait()
    if gone:
        assert time.monotonic() - began < PATIENCE
        assert got.tokens == 0
    settle(pipe)
    assert same(engine, target, at, got.tokens), "wrong bytes"
    assert untouched(target, at[:0] if gone else at)
    return got


def given_up_at_random(
    pipe: Pipeline, engine: Engine, at: np.ndarray, ids: np.ndarray, rng: np.random.Generator, *,
    share: float, empty: float = 0.0,
) -> Any:  # fmt: skip
    """Store or retrieve as many layers as chance will have it, and give up a `share` of these
    requests. The receipt of a retrieve, whose bytes were compared; memory was `empty` so often."""
    if rng.random() < 0.5:
        stored = pipe.begin_store(ids, engine.caches, at)
        for i in range(int(rng.integers(engine.layers + 1))):
            stored.layer_done(i)
        stored.cancel() if rng.random() < share else stored.wait(0.2)
        return None
    if rng.random() < empty:
        cold(pipe)
    target = engine.blank()
    wave = pipe.begin_retrieve(ids, target.caches, at)
    for i in range(int(rng.integers(engine.layers + 1))):
        wave.wait_layer(i)
    if rng.random() < share:
        wave.cancel()
    got = wave.wait(0.2)
    assert same(engine, target, at, got.tokens), "wrong bytes"
    return got


def cold(pipe: Pipeline) -> Pipeline:
    """Memory is empty: what comes now comes out of the store."""
    if "hot" in pipe.tiers:
        pipe._portal.call(pipe.tiers["hot"].clear)
    return pipe


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def lands(pipe: Pipeline, engine: Engine, at: np.ndarray, ids: np.ndarray = IDS) -> None:
    """Store until it comes back whole, out of the store itself."""

    def landed() -> bool:
        receipt = pipe.store(ids, engine.caches, at).wait()
        settle(pipe)
        return not receipt.lost and get(cold(pipe), engine, at, ids).tokens == len(ids)

    until(landed)


@contextlib.contextmanager
def away(victim: Process, end: str) -> Iterator[None]:
    """It hangs, or is dead."""
    if end == "hangs":
        with victim.paused():
            yield
        return
    victim.kill()
    try:
        yield
    finally:
        victim.start()
