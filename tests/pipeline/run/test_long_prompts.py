"""Prompts many times as long as the arena: all of them is kept, at whatever pace the model goes."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Engine, Open, config, settle, tokens

from tierloom import Lost
from tierloom.pipeline.config.spec import Budget
from tierloom.pipeline.run.batching import split_into_batches

LENGTH, STEP = 1 << 17, 1 << 13
PACE = {"by": "layer"}


def long(**changes: object) -> dict:
    """4 MiB of arena for prompts whose KV is 48 MiB."""
    return config(
        chunk={"tokens": 256, "grain": 32, "group": 2}, budget__arena="4 MiB",
        tiers__hot__capacity="64 MiB", graphs__store__deadline="60 s",
        graphs__retrieve__deadline="60 s", **changes,
    )  # fmt: skip


@pytest.fixture
def engine() -> Engine:
    return Engine(blocks=LENGTH // 16)


def fill(engine: Engine, other: Engine) -> None:
    for mine, theirs in zip(engine.flat, other.flat, strict=True):
        mine.copy_(theirs)


def same(one: Engine, other: Engine) -> bool:
    pairs = zip(one.flat, other.flat, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("by", ["layer", "step"])
@pytest.mark.parametrize("step", [LENGTH, STEP])
def test_all_of_it_is_kept(opened: Open, engine: Engine, by: str, step: int) -> None:
    pipe = opened(long(**({"graphs__store__pace": PACE} if by == "layer" else {})), engine)
    ids, at, wanted = tokens(LENGTH), engine.slots(LENGTH), engine.blank()
    fill(wanted, engine)
    for end in range(step, LENGTH + 1, step):
        if by == "step":
            ticket = pipe.store(ids[:end], engine.caches, at[:end])
        else:
            ticket = pipe.begin_store(ids[:end], engine.caches, at[:end])
            for layer in range(engine.layers):
                assert not ticket.is_captured
                ticket.layer_done(layer)
        assert ticket.captured(60)
        if end == LENGTH:
            fill(engine, engine.blank())  # whose memory it is again
        got = ticket.wait()
        assert (got.tokens, got.lost) == (end, {})
    assert pipe.lookup(ids) == LENGTH
    got = pipe.retrieve(ids, engine.caches, at).wait()
    assert (got.tokens, got.lost) == (LENGTH, {})
    assert same(engine, wanted)


def test_all_of_it_is_loaded_where_the_model_asks_layer_by_layer(
    opened: Open, engine: Engine
) -> None:
    """It comes in batches, and its gates open at the end."""
    pipe, target = opened(long(graphs__retrieve__pace=PACE), engine), engine.blank()
    ids, at = tokens(LENGTH), engine.slots(LENGTH)
    assert pipe.store(ids, engine.caches, at).wait().tokens == LENGTH
    wave = pipe.begin_retrieve(ids, target.caches, at)
    assert wave.wait_layer(0) == LENGTH
    assert same(target, engine)


def test_a_long_prompt_whose_model_has_gone_holds_no_memory(opened: Open, engine: Engine) -> None:
    pipe = opened(long(graphs__store__pace=PACE | {"idle": "100 ms"}), engine)
    wave = pipe.begin_store(tokens(LENGTH), engine.caches, engine.slots(LENGTH))
    wave.layer_done(0)
    assert wave.future.result(20).lost == {Lost.LATE: LENGTH // 256}
    settle(pipe)


def test_of_a_long_prompt_that_is_given_up_what_was_kept_is_right(
    opened: Open, engine: Engine
) -> None:
    pipe, wanted = opened(long(graphs__store__pace=PACE), engine), engine.blank()
    fill(wanted, engine)
    ids, at = tokens(LENGTH), np.arange(LENGTH)
    wave = pipe.begin_store(ids, engine.caches, at)
    for layer in range(engine.layers):
        wave.layer_done(layer)
    while not pipe.stats()["tiers"]["hot"]["objects"]:
        time.sleep(0.001)
    wave.cancel()
    fill(engine, engine.blank())  # whose memory it is again
    settle(pipe)
    found = pipe.retrieve(ids, engine.caches, at).wait().tokens
    assert found % 256 == 0
    for got, right in zip(engine.flat, wanted.flat, strict=True):
        assert torch.equal(got[:, : found // 16], right[:, : found // 16])
        assert (got[:, found // 16 :].view(torch.uint8) == 0xA5).all()


@pytest.mark.parametrize("step", [2048, 8192, 16384, 131072])
@pytest.mark.parametrize(
    "token_bytes", [128 << 10, 40 << 10, 16 << 10], ids=["8B", "70B/8", "8B/8"]
)
@pytest.mark.parametrize("arena", [Budget().arena, 512 << 20], ids=["default", "presets"])
def test_no_step_of_a_large_model_is_cut_short(step: int, token_bytes: int, arena: int) -> None:
    """Of models whose KV is too large for a test, the plan: every chunk is in one batch, none is
    lost, and none of its batches wants more than the arena has."""
    chunks = [SimpleNamespace(lost=None, index=i) for i in range(step // 256)]
    size = 256 * token_bytes + 8192
    request = SimpleNamespace(graph="store", layered=True, chunks=chunks, groups=8, allowed=0)
    batches = split_into_batches(request, size, size, arena)  # type: ignore[arg-type]
    assert [c.index for batch in batches for c in batch.chunks] == list(range(step // 256))
    assert not [c for c in chunks if c.lost is not None]
    assert max(len(batch.chunks) for batch in batches) * size <= arena
    assert request.layered == (step // 256 * size <= arena // 2)
    assert request.allowed == 0, "layers that are not computed must not be read"
