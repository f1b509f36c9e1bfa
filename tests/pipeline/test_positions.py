"""Spans that begin inside a block: any block, chunk and grain size, against a plain model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch
from conftest import Engine, config, tokens
from hypothesis import HealthCheck, given, settings, strategies as st

import tierloom
from tierloom import BlockTable, InputError
from tierloom.stages.kv.prefix import Chain

if TYPE_CHECKING:
    from conftest import Open

CASES = int(os.environ.get("TIERLOOM_CASES", "60"))
"""How many random cases."""
SIXTEENS = [16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 320, 384, 512, 768, 1024]


class Case(NamedTuple):
    order: str
    block: int
    grain: int
    chunk: int
    prompt: int
    """Tokens of the prompt that is stored."""
    step: int
    """Tokens that are stored at once, as far as they complete a chunk."""
    ends: int
    """Tokens that are wanted of it."""
    fresh: int
    """Tokens that are there already, and not to be touched; whole blocks."""
    other: int
    """Tokens of a block of the engine that loads."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    grain = draw(st.sampled_from([16, 32, 48, 64]))
    chunk = grain * draw(st.integers(1, max(1, min(16, 1024 // grain))))
    block, other = draw(st.sampled_from(SIXTEENS)), draw(st.sampled_from(SIXTEENS))
    prompt = draw(st.integers(grain, 2600))
    ends = draw(st.integers(1, prompt))
    fresh = draw(st.integers(0, (ends - 1) // other)) * other
    order = draw(st.sampled_from(["2BNHD", "2BHND", "BHNC", "BHNC-KT", "BNHD", "BND"]))
    return Case(order, block, grain, chunk, prompt, draw(st.integers(1, 2600)), ends, fresh, other)


def opened_for(case: Case, engine: Engine) -> tierloom.Pipeline:
    source = config(
        order="canonical", chunk={"tokens": case.chunk, "grain": case.grain, "group": 1}
    )
    return tierloom.open(source, layout=engine.layout, model="m")


def engine_of(case: Case, block: int) -> Engine:
    return Engine(
        case.order, block=block, blocks=-(-2600 // block) + 2, layers=1, heads=1, dim=4,
        dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.slow
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_part_of_any_prompt_comes_back_where_it_belongs(case: Case) -> None:
    """What was stored step by step out of blocks of one size is placed into blocks of another."""
    source, target = engine_of(case, case.block), engine_of(case, case.other).blank()
    ids, slots = tokens(case.prompt), source.slots(case.prompt)
    table = [int(s) // case.block for s in slots[:: case.block]]
    with opened_for(case, source) as pipe:
        seed = pipe.whole(1, 1).digest
        chain = Chain(seed, case.grain)
        chain.extend(ids)
        saved = 0
        for known in (*range(case.step, case.prompt, case.step), case.prompt):
            last = known == case.prompt
            end = known // case.grain * case.grain if last else known // case.chunk * case.chunk
            if end > saved:
                cut = BlockTable.cut(table, case.block, saved, end)
                span = chain.span(saved // case.grain, end // case.grain)
                stored = pipe.store(span, source.caches, blocks=cut).wait()
                assert (stored.tokens, stored.lost) == (end - saved, {})
                saved = end // case.chunk * case.chunk
        # Another engine, with blocks of its own, over the same store.
        to = target.slots(case.ends)
        there = [int(s) // case.other for s in to[:: case.other]]
        first = case.fresh // case.chunk * case.chunk
        until = min(-(-case.ends // case.chunk) * case.chunk // case.grain, len(chain.links))
        span = chain.span(first // case.grain, until, wanted=case.ends - first)
        cut = BlockTable.cut(there, case.other, first, case.ends, fresh=case.fresh)
        got = pipe.retrieve(span, target.caches, blocks=cut, layout=target.layout).wait()
        kept = min(case.ends, case.prompt // case.grain * case.grain)
        assert (got.tokens, got.lost) == (max(0, kept - first), {})
        want = slice(case.fresh, max(case.fresh, kept))
        if want.start < want.stop:
            assert torch.equal(source.rows(slots[want]), target.rows(to[want]))
        assert target.untouched(to[want])


def test_a_table_says_where_its_span_begins(opened: Open) -> None:
    """The same call with and without: a table of 96-token blocks for a span from token 256 on."""
    ids = list(range(7))
    assert BlockTable.cut(ids, 96, 256, 512) == BlockTable([2, 3, 4, 5], 64, 0)
    assert BlockTable.cut(ids, 96, 256, 512, fresh=288) == BlockTable([2, 3, 4, 5], 64, 32)
    table = BlockTable([5, -1, 3], skip=10, spare=4)
    assert table.rows(20, 16, native=False).tolist() == [*[-1] * 4, 94, 95, *[-1] * 14]
    assert list(table.after(0, 16)) == [5, -1, 3]
    assert list(table.after(6, 16)) == [-1, 3]
    assert table.split(2, 8)[1:] == (2, 4)
    assert list(table.split(2, 8).blocks) == [11, -1, -1, 6, 7]
    with pytest.raises(InputError, match="3 blocks of 16 for 39 tokens after 10 others"):
        table.rows(39, 16, native=False)
    with pytest.raises(InputError, match="native order keeps whole blocks"):
        table.rows(16, 16, native=True)
    assert BlockTable([5, 6, 7], 0, 16).rows(40, 16, native=True).tolist() == [-1, 6, 7]
    engine = Engine()
    pipe = opened(config(), engine)
    with pytest.raises(InputError, match="what is stored is stored whole"):
        pipe.store(tokens(32), engine.caches, blocks=[1, -1])
    with pytest.raises(InputError, match="must not be negative"):
        pipe.store(tokens(32), engine.caches, blocks=BlockTable([1, 2, 3], -1))


def test_native_blocks_are_placed_whole_or_not_at_all(opened: Open) -> None:
    engine = Engine("2BHND", block=16)
    pipe = opened(config(order="native"), engine)
    ids, at = tokens(128), engine.slots(128)
    table = [int(s) // 16 for s in at[::16]]
    assert pipe.store(ids, engine.caches, blocks=BlockTable(table)).wait().tokens == 128
    target = engine.blank()
    to = target.slots(128)
    there = [int(s) // 16 for s in to[::16]]
    chain = Chain(pipe.whole(engine.layers, engine.heads).digest, pipe.spec.chunk.grain)
    chain.extend(ids)
    cut = BlockTable.cut(there, 16, 64, 128, fresh=96)
    got = pipe.retrieve(chain.span(4, 8, wanted=64), target.caches, blocks=cut).wait()
    assert (got.tokens, got.lost) == (64, {})
    assert torch.equal(engine.rows(at[96:]), target.rows(to[96:]))
    assert target.untouched(np.asarray(to[96:]))
