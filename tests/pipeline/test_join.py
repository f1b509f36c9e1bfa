"""A chunk that comes in parts is joined with what is kept of it, and an object that begins
elsewhere in the text is never taken for one that begins here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import Engine, config, tokens, with_disk

from tierloom import InputError, Lost
from tierloom.stages.kv.block_table import BlockTable
from tierloom.stages.kv.prefix import Chain, Span

if TYPE_CHECKING:
    from conftest import Open

GRAIN, CHUNK, BLOCK = 16, 64, 16


def chain_of(ids: np.ndarray) -> Chain:
    chain = Chain(b"", GRAIN)
    chain.extend(ids)
    return chain


def store_part(pipe: Any, engine: Engine, ids: np.ndarray, slots: np.ndarray, first: int) -> Any:
    """Tokens from `first` on, as an engine offers them that has only the names of those before."""
    chain, begin = chain_of(ids), first // CHUNK * CHUNK
    table = BlockTable(slots[begin:][::BLOCK] // BLOCK, 0, first - begin)
    hidden = table._replace(
        blocks=np.where(np.arange(len(table.blocks)) * BLOCK < first - begin, -1, table.blocks)
    )
    return pipe.store(chain.span(begin // GRAIN, len(ids) // GRAIN), engine.caches, blocks=hidden)


@pytest.mark.parametrize("order", ["SHD", "BNHD", "BHND", "BND", "2BNHD"])
@pytest.mark.parametrize("first", [16, 48, 80, 176])
@pytest.mark.parametrize("group", [1, 4])
def test_what_comes_in_parts_is_one_object(
    opened: Open, order: str, first: int, group: int
) -> None:
    engine = Engine(order)
    ids, slots, target = tokens(192), engine.slots(192), engine.blank()
    parts = opened(config(chunk__group=group, order="canonical"), engine)
    assert store_part(parts, engine, ids[:first], slots, 0).wait().tokens == first
    got = store_part(parts, engine, ids, slots, first).wait()
    begin = first // CHUNK * CHUNK
    assert (got.tokens, got.lost) == (192 - begin, {})
    chain = chain_of(ids)
    back = parts.retrieve(chain.span(0, 12), target.caches, slots).wait()
    assert (back.tokens, back.lost) == (192, {})
    assert torch.equal(engine.rows(slots), target.rows(slots))


def test_it_equals_the_object_that_comes_whole(opened: Open, tmp_path: Path) -> None:
    engine = Engine("SHD")
    ids, slots = tokens(64), engine.slots(64)
    objects = []
    for name, parts in (("whole", [0]), ("parts", [0, 16, 48])):
        pipe = opened(with_disk(tmp_path / name), engine)
        for first, end in zip(parts, [*parts[1:], 64], strict=True):
            assert store_part(pipe, engine, ids[:end], slots, first).wait().lost == {}
        kept = pipe.tiers["hot"].tier._index.get(chain_of(ids).links[-1]).place
        objects.append(bytes(kept.lease.view[: kept.header.nbytes]))
    assert objects[0] == objects[1]


def test_what_is_kept_no_more_is_said_and_what_follows_is_stored(opened: Open) -> None:
    engine = Engine("SHD")
    ids, slots = tokens(192), engine.slots(192)
    pipe = opened(config(), engine)
    got = store_part(pipe, engine, ids, slots, 48).wait()
    assert (got.tokens, got.lost) == (128, {Lost.ABSENT: 1})


def test_damage_is_not_carried_into_a_new_object(opened: Open) -> None:
    engine = Engine("SHD")
    ids, slots = tokens(128), engine.slots(128)
    pipe = opened(config(), engine)
    store_part(pipe, engine, ids[:48], slots, 0).wait()
    kept = pipe.tiers["hot"].tier._index.get(chain_of(ids[:48]).links[-1]).place
    kept.lease.view[kept.header.frames[1].offset + 5] ^= 1
    got = store_part(pipe, engine, ids, slots, 48).wait()
    assert (got.tokens, got.lost) == (64, {Lost.CORRUPT: 1})


def test_only_the_beginning_may_be_left_out(opened: Open) -> None:
    engine = Engine("BNHD")
    pipe = opened(config(), engine)
    span = chain_of(tokens(64)).span(0, 4)
    with pytest.raises(InputError, match="leave some out"):
        pipe.store(span, engine.caches, blocks=BlockTable([-1, 1, -1, 2], 0, 16))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_object_that_begins_elsewhere_is_a_miss(
    opened: Open, tmp_path: Path, where: str
) -> None:
    """As from an engine that did not say where in the prompt its pages are."""
    engine, target = Engine("SHD"), Engine("SHD").blank()
    ids, slots = tokens(192), engine.slots(192)
    pipe = opened(with_disk(tmp_path), engine)
    chain = chain_of(ids)
    wrong = Span(b"".join(chain.links[2:6]), b"", 64, start=0)
    pipe.store(wrong, engine.caches, slots[32:96]).wait()
    if where == "disk":
        pipe._portal.call(pipe.tiers["hot"].clear)
    got = pipe.retrieve(chain.span(0, 12), target.caches, slots).wait()
    assert got.tokens == 0
    assert target.untouched(slots[:0])
    again = pipe.retrieve(wrong, target.caches, slots[32:96]).wait()
    assert again.tokens == 64
    assert torch.equal(engine.rows(slots[32:96]), target.rows(slots[32:96]))
