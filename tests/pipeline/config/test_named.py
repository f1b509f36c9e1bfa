"""Prompts named by their links, parts of them, and pipelines that hold a share of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from conftest import Engine, config, settle, tokens, with_disk

import tierloom
from tierloom.stages.errors import ConfigError
from tierloom.stages.kv.prefix import Chain

if TYPE_CHECKING:
    from conftest import Open

    from tierloom import Pipeline


def chain_of(pipe: Pipeline, ids: np.ndarray, engine: Engine) -> Chain:
    seed = pipe.whole(engine.layers, engine.heads).digest
    chain = Chain(seed, pipe.spec.chunk.grain)
    chain.extend(ids)
    return chain


@pytest.mark.parametrize("model", ["", "  ", None])
def test_a_model_without_a_name_is_refused(model: str) -> None:
    """Two of one shape would share their KV; a content id is a name, too."""
    engine = Engine()
    with pytest.raises(ConfigError, match="model="):
        tierloom.open(config(), layout=engine.layout, model=model)
    tierloom.open(config(), layout=engine.layout, model="", weights="sha256 of them").close()


@pytest.mark.parametrize("order", ["2BNHD", "BHNC-KT"])
def test_a_named_prompt_is_the_same_as_its_tokens(opened: Open, order: str) -> None:
    engine, ids = Engine(order), tokens(192)
    pipe, target = opened(config(), engine), engine.blank()
    at, to = engine.slots(192), target.slots(192)
    chain = chain_of(pipe, ids, engine)
    stored = pipe.store(chain.span(0, 12), engine.caches, at).wait()
    assert (stored.tokens, stored.lost) == (192, {})
    assert pipe.lookup(ids) == 192
    assert pipe.begin_lookup(chain.span(0, 12)).result(5) == 192
    assert pipe.retrieve(ids, target.caches, to).wait().tokens == 192
    assert torch.equal(engine.rows(at), target.rows(to))


@pytest.mark.parametrize("order", ["2BNHD", "BHNC-KT"])
@pytest.mark.parametrize(("skip", "place"), [(0, 48), (1, 48), (3, 64), (0, 128), (5, 112)])
def test_a_part_is_placed_and_nothing_else(opened: Open, order: str, skip: int, place: int) -> None:
    engine, ids = Engine(order), tokens(192)
    pipe, target = opened(config(), engine), engine.blank()
    blocks = engine.slots(192)[::16] // 16
    pipe.store(ids, engine.caches, blocks=blocks).wait()
    chain = chain_of(pipe, ids, engine)
    table = target.slots(192)[::16] // 16
    wanted = table[4 : 4 + -(-place // 16)].copy()  # the span begins with the second chunk
    wanted[:skip] = -1
    span = chain.span(4, 12, wanted=place)
    got = pipe.retrieve(span, target.caches, blocks=wanted).wait()
    assert (got.tokens, got.lost) == (place, {})
    written = np.concatenate([np.arange(b * 16, b * 16 + 16) for b in wanted[skip:]] or [[]])
    source = np.concatenate(
        [np.arange(b * 16, b * 16 + 16) for b in blocks[4 + skip : 4 + place // 16]] or [[]]
    )
    if len(written):
        assert torch.equal(engine.rows(source.astype(int)), target.rows(written.astype(int)))
    assert target.untouched(written.astype(int))


def test_what_is_promised_is_found_under_the_whole_chunks_name(
    opened: Open, tmp_path: Path
) -> None:
    """Tiers without an index know whole chunks only: the span says all it knows of a chunk."""
    engine, ids = Engine(), tokens(128)
    source = config(tiers__hot={"use": "files", "path": str(tmp_path)})
    pipe, target = opened(source, engine), engine.blank()
    pipe.store(ids, engine.caches, engine.slots(128)).wait()
    chain = chain_of(pipe, ids, engine)
    got = pipe.retrieve(chain.span(0, 8, wanted=112), target.caches, target.slots(112)).wait()
    assert got.tokens == 112
    assert pipe.begin_lookup(chain.span(0, 8)).result(5) == 128


def test_changes_tell_what_is_kept_and_what_went(opened: Open, tmp_path: Path) -> None:
    engine, ids = Engine(), tokens(192)
    pipe = opened(with_disk(tmp_path), engine, watch=True)
    pipe.store(ids, engine.caches, engine.slots(192)).wait()
    seen = pipe.changes()
    assert {(c.tier, c.kept) for c in seen} == {("hot", True), ("warm", True)}
    links = chain_of(pipe, ids, engine).links
    wanted = {b"".join(links[i : i + 4]) for i in (0, 4, 8)}
    assert {c.links for c in seen if c.tier == "hot"} == wanted
    assert {c.links for c in seen if c.tier == "warm"} == wanted
    assert not pipe.changes()
    pipe.clear()
    gone = pipe.changes()
    assert len(gone) == 6
    assert not any(c.kept for c in gone)
    pipe.store(ids, engine.caches, engine.slots(192)).wait()
    settle(pipe)
    pipe.close()
    again = opened(with_disk(tmp_path), engine, watch=True)
    first, rest = again.changes(2), again.changes()
    assert {c.links for c in first + rest} == wanted
    assert (len(first), len(rest)) == (2, 1)


def test_nobody_watches_nothing_is_noted(opened: Open) -> None:
    engine = Engine()
    pipe = opened(config(), engine)
    pipe.store(tokens(64), engine.caches, engine.slots(64)).wait()
    assert not pipe.changes()


def test_shares_of_a_model_have_the_whole_ones_names_and_none_of_its_bytes(
    opened: Open, tmp_path: Path
) -> None:
    """Two ranks keep their halves under one key in one folder, and neither finds the other's."""
    ids, source = tokens(64), config(tiers__hot={"use": "files", "path": str(tmp_path)})
    halves = [Engine(heads=1, seed=s) for s in (1, 2)]
    pipes = [opened(source, half, heads=(i, i + 1), layers=(0, 6)) for i, half in enumerate(halves)]
    whole = [p.whole(6, 2) for p in pipes]
    assert whole[0] == whole[1]
    alone = opened(source, Engine(heads=2), layers=(0, 6), heads=(0, 2))
    assert alone.whole(6, 2) == whole[0] == alone._base
    chain = Chain(whole[0].digest, 16)
    chain.extend(ids)
    at = [half.slots(64) for half in halves]
    pipes[0].store(chain.span(0, 4), halves[0].caches, at[0]).wait()
    assert pipes[0].begin_lookup(chain.span(0, 4)).result(5) == 64
    assert pipes[1].begin_lookup(chain.span(0, 4)).result(5) == 0
    assert alone.begin_lookup(chain.span(0, 4)).result(5) == 0
    pipes[1].store(chain.span(0, 4), halves[1].caches, at[1]).wait()
    for pipe, half, slots in zip(pipes, halves, at, strict=True):
        target = half.blank()
        assert pipe.retrieve(chain.span(0, 4), target.caches, slots).wait().tokens == 64
        assert torch.equal(half.rows(slots), target.rows(slots))


def test_a_replica_leaves_shared_tiers_to_the_first(opened: Open, tmp_path: Path) -> None:
    ids, engine = tokens(64), Engine()
    source = config(tiers__shared={"use": "files", "path": str(tmp_path)})
    source["graphs"]["store"]["stages"]["all"] = {"use": "put", "tier": "shared", "from": "pack"}
    first, twin = opened(source, engine), opened(source, engine, replica=True)
    at = engine.slots(64)
    assert twin.store(ids, engine.caches, at).wait().tiers == {"hot": 1}
    assert not list(tmp_path.rglob("*.tlm1")) or not twin.tiers["shared"].stat().objects
    stored = first.store(ids, engine.caches, at).wait()
    assert stored.tiers == {"hot": 1, "shared": 1}
    twin.clear()


def test_native_bytes_are_bound_to_their_backend(opened: Open) -> None:
    engine = Engine("BHNC-KT")
    one, other = (opened(config(), engine, backend=b) for b in ("vllm a", "vllm b"))
    assert one.native
    assert one.whole(6, 2) != other.whole(6, 2)
    plain = [opened(config(order="canonical"), engine, backend=b) for b in ("vllm a", "vllm b")]
    assert plain[0].whole(6, 2) == plain[1].whole(6, 2)


def test_links_can_depend_on_more_than_tokens() -> None:
    ids = tokens(64)
    plain, image, other = (Chain(b"s" * 32, 16) for _ in range(3))
    plain.extend(ids)
    for chain, extra in ((image, b"cat"), (other, b"dog")):
        chain.extend(ids[:32])
        chain.mix(extra)
        chain.extend(ids[32:])
    assert plain.links[0] == image.links[0] == other.links[0]
    for i in (1, 2, 3):
        assert len({plain.links[i], image.links[i], other.links[i]}) == 3
