"""Text that is kept is found behind whatever, turned to its new place, and compared first."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from conftest import MEMORY, Engine, settle, tokens, with_disk

from tierloom import ConfigError, InputError, Lost
from tierloom.stages.kv.prefix import Span, grain_links
from tierloom.stages.kv.text import Excerpt, Run

from .blends import blending, opened_with, turned

if TYPE_CHECKING:
    from conftest import Open


def values(engine: Engine, slots: np.ndarray) -> torch.Tensor:
    """[kv, layers, tokens, heads, dim] in float64."""
    raw = engine.rows(slots)
    return raw.view(engine.flat[0].dtype).double()


GRAIN = 16


def test_a_passage_is_found_behind_other_text(opened: Open) -> None:
    engine = Engine(dtype=torch.float32)
    pipe, target = opened_with(opened, blending(), engine), engine.blank()
    passage, at = tokens(130, 1), engine.slots(200)
    kept = np.concatenate([tokens(70, 2), passage])
    pipe.store(kept, engine.caches, at).wait()
    prompt = np.concatenate([tokens(33, 3), passage, tokens(20, 4)])
    to = target.slots(len(prompt))
    ticket = pipe.retrieve(prompt, target.caches, to, blend=True)
    got = ticket.wait()
    assert (got.tokens, got.lost) == (0, {})
    # found by grains 80 to 192 of what was kept; its chunk begins at 64, so the passage at 70 is
    # taken from its first token on, and the last 8 tokens lie in a chunk without a whole grain
    first, last = 33, 33 + got.blended
    assert got.blended == 122
    assert ticket.compute() == [(0, first), (last, len(prompt))]
    was, now = values(engine, at[70:192]), values(target, to[first:last])
    assert torch.equal(now[1], was[1])
    assert (now[0] - turned(was[0], first - 70)).abs().max() < 1e-5
    assert (now[0] - was[0]).abs().max() > 0.1
    assert target.untouched(to[first:last])


def test_who_computes_by_the_plan_gets_no_more_than_it(opened: Open) -> None:
    """Before the object has come only whole grains are known; rows said to be computed are not
    placed afterwards."""
    engine = Engine()
    source = blending()
    source["graphs"]["retrieve"]["pace"] = {"by": "layer", "window": 1}
    pipe, target = opened_with(opened, source, engine), engine.blank()
    passage = tokens(122, 1)
    kept = np.concatenate([tokens(70, 2), passage])
    pipe.store(kept, engine.caches, engine.slots(192)).wait()
    prompt = np.concatenate([tokens(33, 3), passage])
    to = target.slots(len(prompt))
    wave = pipe.begin_retrieve(prompt, target.caches, to, blend=True)
    assert wave.compute() == [(0, 43)]
    for layer in range(engine.layers):
        wave.wait_layer(layer)
    assert wave.wait().blended == 112
    assert target.untouched(to[43:])


def test_nobody_who_does_not_ask_gets_it(opened: Open) -> None:
    engine = Engine()
    pipe, target = opened_with(opened, blending(), engine), engine.blank()
    passage = tokens(128, 1)
    pipe.store(np.concatenate([tokens(64, 2), passage]), engine.caches, engine.slots(192)).wait()
    prompt = np.concatenate([tokens(64, 3), passage])
    got = pipe.retrieve(prompt, target.caches, target.slots(192)).wait()
    assert (got.tokens, got.blended) == (0, 0)
    assert pipe.lookup(prompt) == 0
    assert target.untouched(np.zeros(0, np.int64))


def test_behind_an_exact_prefix(opened: Open) -> None:
    engine = Engine(dtype=torch.float32)
    pipe, target = opened_with(opened, blending(), engine), engine.blank()
    system, one, two = tokens(64, 1), tokens(96, 2), tokens(96, 3)
    at = engine.slots(256)
    pipe.store(np.concatenate([system, one, two]), engine.caches, at).wait()
    prompt = np.concatenate([system, two, one, tokens(8, 4)])
    to = target.slots(len(prompt))
    ticket = pipe.retrieve(prompt, target.caches, to, blend=True)
    got = ticket.wait()
    assert (got.tokens, got.blended) == (64, 192)
    assert ticket.compute() == [(256, 264)]
    was, now = values(engine, at), values(target, to[:256])
    assert torch.equal(now[:, :, :64], was[:, :, :64])
    assert torch.equal(now[1, :, 64:160], was[1, :, 160:256])
    assert (now[0, :, 64:160] - turned(was[0, :, 160:256], -96)).abs().max() < 1e-5
    assert (now[0, :, 160:256] - turned(was[0, :, 64:160], 96)).abs().max() < 1e-5


def test_text_where_it_was_is_the_same_bytes(opened: Open) -> None:
    """Another first half: the second stands where it stood, and is not turned."""
    engine = Engine()
    pipe, target = opened_with(opened, blending(), engine), engine.blank()
    passage, at = tokens(128, 1), engine.slots(192)
    pipe.store(np.concatenate([tokens(64, 2), passage]), engine.caches, at).wait()
    to = target.slots(192)
    prompt = np.concatenate([tokens(64, 3), passage])
    assert pipe.retrieve(prompt, target.caches, to, blend=True).wait().blended == 128
    assert torch.equal(engine.rows(at[64:]), target.rows(to[64:]))


def test_heads_are_computed_and_not_placed(opened: Open) -> None:
    engine = Engine()
    pipe = opened_with(opened, blending(policy="heads", heads=5), engine)
    target, passage = engine.blank(), tokens(128, 1)
    pipe.store(np.concatenate([tokens(64, 2), passage]), engine.caches, engine.slots(192)).wait()
    prompt, to = np.concatenate([tokens(64, 3), passage]), target.slots(192)
    ticket = pipe.retrieve(prompt, target.caches, to, blend=True)
    ticket.wait()
    assert ticket.needs == "nothing"
    assert ticket.compute() == [(0, 69)]
    assert target.untouched(to[69:])


def test_scores_choose_besides_heads(opened: Open) -> None:
    engine = Engine()
    mend = {"policy": "probe", "heads": 4, "share": "5 %", "ceiling": "12 %"}
    pipe, target = opened_with(opened, blending(**mend), engine), engine.blank()
    passage = tokens(128, 1)
    pipe.store(np.concatenate([tokens(64, 2), passage]), engine.caches, engine.slots(192)).wait()
    prompt, to = np.concatenate([tokens(64, 3), passage]), target.slots(192)
    ticket = pipe.retrieve(prompt, target.caches, to, blend=True)
    ticket.wait()
    assert ticket.needs == "scores"
    assert ticket.compute() == [(0, 68)]
    scores = np.zeros(192)
    scores[[100, 101, 150]] = 1.0
    scores[:64] = 9.0  # computed anyway
    chosen = sum(b - a for a, b in ticket.compute(scores)) - 68
    assert chosen == int(0.05 * 128)
    assert {(100, 102), (150, 151)} <= set(ticket.compute(scores))
    assert not target.untouched(np.zeros(0, np.int64))
    assert target.untouched(to[64:])


@pytest.mark.parametrize("other", ["salt", "adapter", "tags", "model"])
def test_what_is_anothers_is_never_found(opened: Open, other: str) -> None:
    engine, passage = Engine(), tokens(128, 1)
    pipe, target = opened_with(opened, blending(), engine), engine.blank()
    kept = np.concatenate([tokens(64, 2), passage])
    names = {"salt": {"salt": "x"}, "adapter": {"adapter": "y"}, "tags": {"tags": {"a": "b"}}}
    pipe.store(kept, engine.caches, engine.slots(192), **names.get(other, {})).wait()
    if other == "model":
        pipe = opened_with(opened, blending(), engine, model="another")
    prompt, to = np.concatenate([tokens(64, 3), passage]), target.slots(192)
    assert pipe.retrieve(prompt, target.caches, to, blend=True).wait().blended == 0
    if other != "model":
        again = pipe.retrieve(prompt, target.caches, to, blend=True, **names[other]).wait()
        assert again.blended == 128


def test_a_false_fingerprint_is_a_miss(opened: Open) -> None:
    """What an index takes for the prompt's text is compared token by token."""
    engine = Engine()
    pipe, target = opened_with(opened, blending(), engine), engine.blank()
    kept, at = tokens(128, 1), engine.slots(128)
    pipe.store(kept, engine.caches, at).wait()
    key = next(iter(pipe.tiers["hot"].tier._index)).key
    prompt = np.concatenate([tokens(64, 2), kept[:40], tokens(24, 3)])
    runs = [Run((Excerpt(64, 64, key, 0, 0),), seam=True)]
    ticket = pipe.retrieve(prompt, target.caches, target.slots(128), blend=runs)
    assert (ticket.wait().blended, ticket.wait().lost) == (0, {Lost.ABSENT: 1})
    assert ticket.compute() == [(0, 128)]
    assert target.untouched(np.zeros(0, np.int64))
    # it is a good object: who asks for its text has it
    assert pipe.retrieve(kept, target.caches, target.slots(128)).wait().tokens == 128


def test_a_damaged_passage_is_computed_and_the_rest_stands(opened: Open, tmp_path: Path) -> None:
    engine = Engine()
    source = blending(with_disk(tmp_path))
    del source["tiers"]["hot"], source["graphs"]["store"]["stages"]["hot"]
    del source["graphs"]["retrieve"]["stages"]["fetch"]["promote"]
    pipe, target = opened_with(opened, source, engine), engine.blank()
    one, two = tokens(64, 1), tokens(64, 2)
    at = engine.slots(128)
    pipe.store(np.concatenate([one, two]), engine.caches, at).wait()
    settle(pipe)
    first = next(iter(pipe.tiers["warm"].tier._index)).place.pieces[0]
    segment = next(p for p in sorted(tmp_path.iterdir()) if p.stat().st_size >= 1 << 20)
    with segment.open("r+b") as file:  # a byte of a frame
        file.seek(first[0] + 4096 + 7)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    prompt, to = np.concatenate([tokens(32, 3), one, two]), target.slots(160)
    ticket = pipe.retrieve(prompt, target.caches, to, blend=True)
    got = ticket.wait()
    assert (got.blended, got.lost) == (64, {Lost.CORRUPT: 1})
    lost = ticket.compute()
    assert lost in ([(0, 96)], [(0, 32), (96, 160)])
    second = lost == [(0, 96)]
    placed, was = (to[96:160], at[64:]) if second else (to[32:96], at[:64])
    assert torch.equal(values(target, placed)[1], values(engine, was)[1])


def test_text_is_found_again_after_a_restart(opened: Open, tmp_path: Path) -> None:
    engine, passage = Engine(), tokens(128, 1)
    pipe, target = opened_with(opened, blending(with_disk(tmp_path)), engine), engine.blank()
    pipe.store(np.concatenate([tokens(64, 2), passage]), engine.caches, engine.slots(192)).wait()
    settle(pipe)
    pipe.close()
    pipe = opened_with(opened, blending(with_disk(tmp_path)), engine)
    end = time.monotonic() + 20
    while len(pipe._worker._texts.index) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    prompt = np.concatenate([tokens(64, 3), passage])
    got = pipe.retrieve(prompt, target.caches, target.slots(192), blend=True).wait()
    assert got.blended == 128


def test_objects_of_before_are_never_matched(opened: Open, tmp_path: Path) -> None:
    """Kept without their text, they serve prefixes and nothing else."""
    engine, passage = Engine(), tokens(128, 1)
    plain = with_disk(tmp_path)
    pipe, target = opened_with(opened, plain, engine), engine.blank()
    kept = np.concatenate([tokens(64, 2), passage])
    pipe.store(kept, engine.caches, engine.slots(192)).wait()
    settle(pipe)
    pipe.close()
    pipe = opened_with(opened, blending(with_disk(tmp_path)), engine)
    settle(pipe)
    prompt = np.concatenate([tokens(64, 3), passage])
    got = pipe.retrieve(prompt, target.caches, target.slots(192), blend=True).wait()
    assert (got.tokens, got.blended) == (0, 0)
    assert pipe.retrieve(kept, target.caches, target.slots(192)).wait().tokens == 192


def test_text_that_is_kept_is_not_kept_again(opened: Open) -> None:
    engine = Engine()
    pipe = opened_with(opened, blending(), engine)
    passage = tokens(128, 1)
    pipe.store(np.concatenate([tokens(64, 2), passage]), engine.caches, engine.slots(192)).wait()
    before = pipe.tiers["hot"].stat().objects
    again = np.concatenate([tokens(64, 3), passage])
    got = pipe.store(again, engine.caches, engine.slots(192)).wait()
    assert (got.tokens, got.tiers) == (192, {"hot": 1})
    assert pipe.tiers["hot"].stat().objects == before + 1
    assert pipe.store(again, engine.caches, engine.slots(192)).wait().tiers == {}


def test_approximate_kv_is_kept_under_no_name(opened: Open) -> None:
    """New text behind reused text is kept, where only those find it who look anywhere."""
    engine = Engine()
    pipe, target = opened_with(opened, blending(), engine), engine.blank()
    prompt, at = tokens(256, 1), engine.slots(256)
    got = pipe.store(prompt, engine.caches, at, exact=64).wait()
    assert got.tiers == {"hot": 4}
    assert pipe.lookup(prompt) == 64
    assert pipe.retrieve(prompt, target.caches, target.slots(256)).wait().tokens == 64
    to = target.slots(256)
    found = pipe.retrieve(prompt, target.caches, to, blend=True).wait()
    assert (found.tokens, found.blended) == (64, 192)
    assert torch.equal(engine.rows(at), target.rows(to))


def test_without_texts_nothing_approximate_is_kept_at_all(opened: Open) -> None:
    engine = Engine()
    pipe = opened(MEMORY, engine)
    got = pipe.store(tokens(256, 1), engine.caches, engine.slots(256), exact=100).wait()
    assert (got.tiers, pipe.lookup(tokens(256, 1))) == ({"hot": 1}, 64)


def test_without_a_known_rotation_nothing_is_blended(opened: Open) -> None:
    engine, passage = Engine(), tokens(128, 1)
    pipe, target = opened(blending(), engine, rope='{"rope_type": "odd"}'), engine.blank()
    pipe.store(np.concatenate([tokens(64, 2), passage]), engine.caches, engine.slots(192)).wait()
    prompt = np.concatenate([tokens(64, 3), passage])
    ticket = pipe.retrieve(prompt, target.caches, target.slots(192), blend=True)
    assert ticket.wait().blended == 0
    assert ticket.compute() == [(0, 192)]


def test_one_token_repeated(opened: Open) -> None:
    engine = Engine(blocks=140)
    pipe, target = opened_with(opened, blending(), engine), engine.blank()
    kept = np.full(1024, 7, np.int32)
    pipe.store(kept, engine.caches, engine.slots(1024)).wait()
    prompt = np.concatenate([tokens(5, 1), np.full(1000, 7, np.int32)])
    ticket = pipe.retrieve(prompt, target.caches, target.slots(1005), blend=True)
    got = ticket.wait()
    computed = sum(b - a for a, b in ticket.compute())
    assert got.blended + computed == 1005
    assert computed < 5 + 64


def test_layer_by_layer(opened: Open) -> None:
    engine = Engine()
    source = blending()
    source["graphs"]["retrieve"]["pace"] = {"by": "layer", "window": 1}
    pipe, target, passage = opened_with(opened, source, engine), engine.blank(), tokens(128, 1)
    at = engine.slots(192)
    pipe.store(np.concatenate([tokens(64, 2), passage]), engine.caches, at).wait()
    prompt, to = np.concatenate([tokens(64, 3), passage]), target.slots(192)
    wave = pipe.begin_retrieve(prompt, target.caches, to, blend=True)
    assert wave.planned() == 128
    assert wave.compute() == [(0, 64)]
    for layer in range(engine.layers):
        wave.wait_layer(layer)
    assert wave.wait().blended == 128
    assert torch.equal(engine.rows(at[64:]), target.rows(to[64:]))


def test_misuse_is_said(opened: Open, tmp_path: Path) -> None:
    engine = Engine()
    pipe = opened_with(opened, blending(), engine)
    with pytest.raises(InputError, match="blend"):
        pipe.store(tokens(64), engine.caches, engine.slots(64), blend=True)
    source = blending()
    source["graphs"]["retrieve"]["stages"]["plan"]["by"] = "content"
    with pytest.raises(ConfigError, match="by: content"):
        opened_with(opened, source, engine)
    key = tmp_path / "a.key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    source = blending()
    stages = source["graphs"]["store"]["stages"]
    stages["host"] = {"use": "to_host", "from": "pack"}
    stages["lock"] = {"use": "aesgcm", "keys": [str(key)], "from": "host"}
    stages["hot"] = {**stages["hot"], "from": "lock"}
    with pytest.raises(ConfigError, match="token ids"):
        opened_with(opened, source, engine)
    with pytest.raises(ConfigError, match="order: canonical"):
        opened_with(opened, {**blending(), "order": "native"}, Engine("BHND"))
    shared = blending()
    shared["chunk"] = {**shared["chunk"], "keys": "sglang"}
    with pytest.raises(ConfigError, match="whose text"):
        opened_with(opened, shared, engine)


def test_text_of_nobody_known_is_neither_kept_nor_found(opened: Open) -> None:
    """A span that does not say its prompt's first link may be any tenant's."""
    engine = Engine()
    pipe, target = opened_with(opened, blending(), engine), engine.blank()
    ids = tokens(128, 1)
    for seed in (b"a" * 32, b"b" * 32):
        links = b"".join(grain_links(seed, ids, GRAIN))
        span = Span(links, seed, 128, start=0)
        got = pipe.retrieve(span, target.caches, target.slots(128), ids=ids, blend=True).wait()
        assert (got.tokens, got.blended) == (0, 0)
        pipe.store(span, engine.caches, engine.slots(128), ids=ids).wait()
    assert target.untouched(np.zeros(0, np.int64))
    assert len(pipe._worker._texts.index) == 0


def test_headers_that_do_not_fit_the_arena_are_left_out(opened: Open, tmp_path: Path) -> None:
    """Kept by an engine with more memory: the pipeline opens, serves, and notes no more of them."""
    engine = Engine(heads=8, dim=128)
    pipe = opened_with(opened, blending(with_disk(tmp_path, budget__arena="8 MiB")), engine)
    pipe.store(tokens(192, 1), engine.caches, engine.slots(192)).wait()
    settle(pipe)
    pipe.close()
    small = with_disk(tmp_path, budget__arena="1 MiB")
    pipe = opened_with(opened, blending(small), engine)
    pipe.store(tokens(16, 2), engine.caches, engine.slots(16)).wait()
    settle(pipe)
    assert pipe._worker._texts._untold is None
    assert pipe._portal.alive
