"""Requests to remote stores given up half-way: nobody writes any more, and nothing is seen torn."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from buckets import Gate
from conftest import Engine, settle, tokens
from kinds import KINDS, SERVED, WIRED, kinds
from stores import IDS
from trips import PACES, get, lands, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Open
    from stores import Store

    from tierloom import Pipeline


class Dam(Gate):
    """A gate that shuts by itself when so many bytes have come, from the server or for it."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self._left: dict[bool, int] = {}
        self.asked = lambda data: self._count(True, data)
        self.change = lambda data: self._count(False, data)

    def shut_after(self, nbytes: int, *, asks: bool = False) -> None:
        self._left = {asks: nbytes}

    def lift(self) -> None:
        self._left = {}
        self.open.set()

    def _count(self, asks: bool, data: bytes) -> bytes:
        if asks in self._left:
            self._left[asks] -= len(data)
            if self._left[asks] < 0:
                self.open.clear()
        return data


@pytest.fixture
def dam(store: Store) -> Iterator[Dam]:
    with contextlib.closing(Dam(store.port)) as made:
        yield made


def given_up(pipe: Pipeline, engine: Engine, at: Any, when: Any, after: Any) -> None:
    """Cancel a retrieve `when` it is time; what comes `after` finds nobody."""
    target = engine.blank()
    ticket = pipe.begin_retrieve(IDS, target.caches, at)
    when(ticket)
    ticket.cancel()
    frozen = [t.clone() for t in target.flat]
    assert ticket.wait().tokens in (0, 64, 128, 192)
    after()
    settle(pipe)
    assert all(torch.equal(a, b) for a, b in zip(frozen, target.flat, strict=True))
    assert get(pipe, engine, at).tokens == 192


@kinds(WIRED)
def test_given_up_while_bytes_are_on_their_way(over: Open, store: Store, dam: Dam) -> None:
    engine = Engine()
    at = engine.slots(192)

    def shut(ticket: Any) -> None:
        for _ in range(500):
            if not dam.open.is_set():
                return
            time.sleep(0.01)
        pytest.fail("it never set out")

    for by in PACES:
        pipe = over(engine, by=by, port=dam.port)
        lands(pipe, engine, at)
        # By layer no more sets out than the window has.
        for nbytes in (0, 10_000, 20_000) if by == "layer" else (0, 30_000, 60_000):
            dam.shut_after(nbytes)
            given_up(pipe, engine, at, shut, dam.lift)


@kinds([name for name in KINDS if name not in WIRED])
def test_given_up_at_any_layer(over: Open, store: Store) -> None:
    engine = Engine()
    at = engine.slots(192)
    for by in PACES:
        pipe = over(engine, by=by)
        lands(pipe, engine, at)
        for layers in range(engine.layers + 1):

            def wait(ticket: Any, layers: int = layers) -> None:
                for i in range(layers):
                    ticket.wait_layer(i)

            given_up(pipe, engine, at, wait, lambda: None)
        pipe.close()


@kinds(SERVED)
def test_a_store_that_its_deadline_ends(over: Open, store: Store, dam: Dam) -> None:
    """Their memory is used again while the server still waits for them: none is seen torn."""
    engine = Engine()
    at = engine.slots(192)
    prompts = [tokens(192, seed=seed) for seed in (1, 2)]

    def in_vain(pipe: Pipeline, ids: np.ndarray) -> bool:
        """Whether the objects set out, which they do within the deadline on a quick machine."""
        with contextlib.ExitStack() as stack:
            if store.port:
                dam.shut_after(20_000, asks=True)
                stack.callback(dam.lift)
            else:
                stack.enter_context(store.victims[-1].paused())
            receipt = pipe.store(ids, engine.caches, at).wait()
            set_out = not store.port or not dam.open.is_set()
            assert (receipt.tokens, receipt.tiers) == (0, {})
        settle(pipe)
        return set_out

    for by in PACES:
        pipe = over(
            engine, by=by, port=dam.port if store.port else 0, model=by,
            graphs__store__deadline="300 ms", tiers__cold__fails=1000,
        )  # fmt: skip
        lands(pipe, engine, at, tokens(64))
        for ids in prompts:
            until(lambda pipe=pipe, ids=ids: in_vain(pipe, ids))
        for ids in prompts:
            get(pipe, engine, at, ids)
            lands(pipe, engine, at, ids)
