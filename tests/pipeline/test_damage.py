"""Damage of every kind, in memory and on disk: a miss, counted, and never a wrong byte."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from conftest import Engine, config, settle, tokens, with_disk

from tierloom import Lost

if TYPE_CHECKING:
    from conftest import Open

    from tierloom import Pipeline

IDS = tokens(192)


def never_wrong(pipe: Pipeline, engine: Engine, at: np.ndarray) -> int:
    """Retrieve; check what came; how many tokens."""
    target = engine.blank()
    got = pipe.retrieve(IDS, target.caches, at).wait()
    n = got.tokens
    assert n == 0 or torch.equal(engine.rows(at[:n]), target.rows(at[:n])), "wrong bytes"
    settle(pipe)
    return n


def hot_objects(pipe: Pipeline) -> list[memoryview]:
    """The bytes of every object in the memory tier."""
    entries = pipe.tiers["hot"].tier._index._entries.values()
    return [e.place.lease.view for e in entries]


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_flipped_bits_in_memory(opened: Open, codec: str | None) -> None:
    source = config()
    if codec:
        stages = source["graphs"]["store"]["stages"]
        del stages["hot"]
        stages |= {
            "host": {"use": "to_host"},
            "s": {"use": codec},
            "hot": {"use": "put", "tier": "hot"},
        }
    engine = Engine()
    for t in engine.flat:
        t.copy_(t.round())
    pipe, at = opened(source, engine), engine.slots(192)
    rng = np.random.default_rng(1)
    pipe.store(IDS, engine.caches, at).wait()
    assert never_wrong(pipe, engine, at) == 192
    for _ in range(25):
        views = hot_objects(pipe)
        k = int(rng.integers(len(views)))
        bit = int(
            rng.integers(4096 * 8, len(views[k]) * 8)
        )  # the header in memory is not read again
        views[k][bit // 8] ^= 1 << bit % 8
        del views
        n = never_wrong(pipe, engine, at)
        assert n in (0, 64, 128, 192)
        if n < 192:
            assert pipe.lookup(IDS) == n, "the bad object must be gone"
        pipe.store(IDS, engine.caches, at).wait()
        settle(pipe)
    assert never_wrong(pipe, engine, at) == 192


def test_a_corrupt_chunk_is_counted_and_stored_again(opened: Open) -> None:
    engine = Engine()
    pipe, at = opened(config(), engine), engine.slots(192)
    pipe.store(IDS, engine.caches, at).wait()
    for view in hot_objects(pipe):
        view[5000] ^= 1
        del view
    target = engine.blank()
    got = pipe.retrieve(IDS, target.caches, at).wait()
    assert got.tokens == 0
    assert got.lost[Lost.CORRUPT] >= 1
    settle(pipe)
    assert pipe.stats()["tiers"]["hot"]["corrupt"] >= 1
    assert pipe.store(IDS, engine.caches, at).wait().tokens == 192
    assert never_wrong(pipe, engine, at) == 192


def test_trusting_the_arena_is_not_trusting_the_disk(opened: Open, tmp_path: Path) -> None:
    engine = Engine()
    at = engine.slots(192)
    source = with_disk(tmp_path, verify="remote")
    pipe = opened(source, engine)
    pipe.store(IDS, engine.caches, at).wait()
    settle(pipe)
    assert never_wrong(pipe, engine, at) == 192
    pipe.close()
    (segment,) = tmp_path.glob("segment-*.slab")
    raw = bytearray(segment.read_bytes())
    for start in (i for i in range(0, len(raw), 4096) if raw[i : i + 4] == b"TLM1"):
        raw[start + 5000] ^= 1
    segment.write_bytes(raw)
    pipe = opened(source, engine)
    assert pipe.lookup(IDS) == 192
    assert never_wrong(pipe, engine, at) == 0
    assert pipe.stats()["tiers"]["warm"]["corrupt"] >= 1


def damaged_disk(folder: Path, rng: np.random.Generator, kind: str, size: int) -> None:
    """Damage one object of the given size somewhere in the segment files."""
    files = sorted(folder.rglob("*.seg")) or sorted(
        p for p in folder.rglob("*") if p.stat().st_size >= size
    )
    path = files[int(rng.integers(len(files)))]
    raw = bytearray(path.read_bytes())
    starts = [i for i in range(0, len(raw), 4096) if raw[i : i + 4] == b"TLM1"]
    start = starts[int(rng.integers(len(starts)))]
    at = start + int(rng.integers(size))
    if kind == "flip":
        raw[at] ^= 1 << int(rng.integers(8))
    elif kind == "zero":
        page = start + int(rng.integers(size // 4096)) * 4096
        raw[page : page + 4096] = bytes(4096)
    elif kind == "swap" and len(starts) > 1:
        a, b = (int(x) for x in rng.choice(starts, 2, replace=False))
        raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]
    elif kind == "truncate":
        raw = raw[: at // 4096 * 4096]
    path.write_bytes(raw)


@pytest.mark.parametrize("kind", ["flip", "zero", "swap", "truncate"])
@pytest.mark.parametrize("layered", [False, True], ids=["whole", "layered"])
def test_damage_on_disk(opened: Open, tmp_path: Path, kind: str, layered: bool) -> None:
    engine = Engine()
    at = engine.slots(192)
    rng = np.random.default_rng(7)
    misses = 0
    for n in range(8):
        folder = tmp_path / str(n)
        source = with_disk(folder, graphs__retrieve__pace={"by": "layer" if layered else "request"})
        pipe = opened(source, engine)
        pipe.store(IDS, engine.caches, at).wait()
        settle(pipe)
        pipe.close()
        size = 4096 + 3 * 2 * 2 * 64 * 2 * 8 * 2
        damaged_disk(folder, rng, kind, size)
        pipe = opened(source, engine)
        target = engine.blank()
        begin = pipe.begin_retrieve if layered else pipe.retrieve
        ticket = begin(IDS, target.caches, at)
        for i in range(engine.layers):
            ticket.wait_layer(i)
        got = ticket.wait()
        t = got.tokens
        assert t == 0 or torch.equal(engine.rows(at[:t]), target.rows(at[:t])), "wrong bytes"
        misses += t < 192
        settle(pipe)
        pipe.close()
    assert misses, "the damage never hit anything"
