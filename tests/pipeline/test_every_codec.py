"""Every codec from store to disk to retrieve, read by whatever config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import Engine, config, settle, tokens, with_disk

from tierloom import LayoutError, Lost

if TYPE_CHECKING:
    import numpy as np
    from conftest import Open

IDS = tokens(200)
LOSS = {
    "zstd": 0.0, "lz4": 0.0, "rans": 0.0, "aesgcm": 0.0,
    "int8": 0.008, "fp8": 0.03, "int4": 0.09, "turboquant": 0.11, "cachegen": 0.13,
    "progressive": 0.05,
}  # fmt: skip
"""Noise of a Gaussian's numbers, relative."""


def key_file(folder: Path) -> str:
    path = folder / "key"
    if not path.exists():
        path.write_bytes(os.urandom(32))
        path.chmod(0o600)
    return str(path)


def encoded(folder: Path, *uses: str, **changes: Any) -> dict[str, Any]:
    """Plain in memory, through codecs on disk."""
    source = with_disk(folder / "tier", **changes)
    stages = source["graphs"]["store"]["stages"]
    del stages["warm"]
    stages["host"] = {"use": "to_host", "from": "pack"}
    for use in uses:
        stages[use] = {"use": use} | ({"keys": [key_file(folder)]} if use == "aesgcm" else {})
    stages["warm"] = {"use": "put", "tier": "warm", "when_full": "block"}
    source["graphs"]["retrieve"]["stages"]["grow"]["keys"] = [key_file(folder)]
    return source


def numbers(engine: Engine, at: np.ndarray) -> torch.Tensor:
    return engine.rows(at).view(engine.flat[0].dtype).float()


def lost_of(engine: Engine, target: Engine, at: np.ndarray) -> float:
    a, b = numbers(engine, at), numbers(target, at)
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("use", LOSS)
def test_stored_encoded_and_read_by_another_config(
    opened: Open, tmp_path: Path, use: str, dtype: torch.dtype
) -> None:
    engine = Engine(dim=32, dtype=dtype)
    target, at = engine.blank(), engine.slots(200)
    pipe = opened(encoded(tmp_path, use), engine)
    assert pipe.store(IDS, engine.caches, at).wait().tiers == {"hot": 4, "warm": 4}
    settle(pipe)
    pipe.close()
    others = [u for u in LOSS if u != use]
    pipe = opened(encoded(tmp_path, others[0], chunk__group=3), engine)
    for tier in ("warm", "hot"):  # from disk, then as it was promoted
        got = pipe.retrieve(IDS, target.caches, at).wait()
        assert (got.tokens, got.lost, got.tiers) == (200, {}, {tier: 4})
        assert lost_of(engine, target, at) <= LOSS[use]
        assert LOSS[use] or torch.equal(engine.rows(at), target.rows(at))
        assert target.untouched(at)
        settle(pipe)


@pytest.mark.parametrize("use", ["int8", "fp8", "int4", "turboquant", "cachegen", "progressive"])
def test_lossy_codecs_choose_canonical_order(opened: Open, tmp_path: Path, use: str) -> None:
    engine = Engine("BHND", dim=32)
    assert opened(config(), engine).native
    pipe = opened(encoded(tmp_path, use), engine)
    assert not pipe.native
    target, at = engine.blank(), engine.slots(200)
    pipe.store(IDS, engine.caches, at).wait()
    settle(pipe)
    pipe._portal.call(pipe.tiers["hot"].clear)
    assert pipe.retrieve(IDS, target.caches, at).wait().tokens == 200
    assert 0 < lost_of(engine, target, at) <= LOSS[use]


@pytest.mark.parametrize("order", ["2BNHD", "BHND"])
@pytest.mark.parametrize("use", ["zstd", "rans", "aesgcm"])
def test_lossless_codecs_take_any_order(opened: Open, tmp_path: Path, use: str, order: str) -> None:
    engine = Engine(order, dim=32)
    pipe = opened(encoded(tmp_path, use), engine)
    assert pipe.native == (order == "BHND")
    target, at = engine.blank(), engine.slots(192)
    pipe.store(IDS[:192], engine.caches, at).wait()
    settle(pipe)
    pipe._portal.call(pipe.tiers["hot"].clear)
    assert pipe.retrieve(IDS[:192], target.caches, at).wait().tokens == 192
    assert torch.equal(engine.rows(at), target.rows(at))


@pytest.mark.parametrize("layered", [False, True])
def test_chains(opened: Open, tmp_path: Path, layered: bool) -> None:
    pace = {"graphs__store__pace": {"by": "layer"}} if layered else {}
    engine = Engine(dim=32)
    pipe = opened(encoded(tmp_path, "int4", "zstd", "aesgcm", **pace), engine)
    target, at = engine.blank(), engine.slots(200)
    ticket = (pipe.begin_store if layered else pipe.store)(IDS, engine.caches, at)
    for layer in range(engine.layers if layered else 0):
        ticket.layer_done(layer)
    assert ticket.wait().tiers == {"hot": 4, "warm": 4}
    settle(pipe)
    pipe._portal.call(pipe.tiers["hot"].clear)
    assert pipe.retrieve(IDS, target.caches, at).wait().tokens == 200
    assert lost_of(engine, target, at) <= LOSS["int4"]


def test_int4_spares_the_first_tokens_of_the_prompt_only(opened: Open, tmp_path: Path) -> None:
    engine = Engine(dim=32)
    pipe = opened(encoded(tmp_path, "int4"), engine)
    target, at = engine.blank(), engine.slots(200)
    pipe.store(IDS, engine.caches, at).wait()
    settle(pipe)
    pipe._portal.call(pipe.tiers["hot"].clear)
    pipe.retrieve(IDS, target.caches, at).wait()
    same = (numbers(engine, at) == numbers(target, at)).all(-1).all(-1).all(1).all(0)
    assert same[:6].tolist() == [True] * 4 + [False] * 2
    assert not same[64:70].any()


def test_a_group_that_is_not_finite_is_kept_as_it_is(opened: Open, tmp_path: Path) -> None:
    engine = Engine(dim=32)
    at, target = engine.slots(200), engine.blank()
    engine.caches[0][0, at[0] // 16, at[0] % 16, 0, 0] = float("nan")
    pipe = opened(encoded(tmp_path, "int8"), engine)
    pipe.store(IDS, engine.caches, at).wait()
    settle(pipe)
    pipe._portal.call(pipe.tiers["hot"].clear)
    assert pipe.retrieve(IDS, target.caches, at).wait().tokens == 200
    kept, came = engine.rows(at), target.rows(at)
    assert torch.equal(kept[:, :2, :64], came[:, :2, :64])  # the frame that has it
    assert not torch.equal(kept[:, 2:], came[:, 2:])


@pytest.mark.parametrize("reader", ["without keys", "with another key"])
def test_without_the_key_it_is_a_miss(opened: Open, tmp_path: Path, reader: str) -> None:
    engine = Engine(dim=32)
    at, target = engine.slots(200), engine.blank()
    pipe = opened(encoded(tmp_path, "aesgcm"), engine)
    pipe.store(IDS, engine.caches, at).wait()
    settle(pipe)
    pipe.close()
    owner, source = encoded(tmp_path, "aesgcm"), encoded(tmp_path, "aesgcm")
    del source["graphs"]["retrieve"]["stages"]["grow"]["keys"]
    if reader == "with another key":
        (tmp_path / "other").mkdir()
        source["graphs"]["retrieve"]["stages"]["grow"]["keys"] = [key_file(tmp_path / "other")]
    pipe = opened(source, engine)
    got = pipe.retrieve(IDS, target.caches, at).wait()
    assert got.tokens == 0
    assert got.lost[Lost.NO_KEY] == 4
    assert target.untouched(at[:0])
    settle(pipe)
    assert pipe.lookup(IDS) == 0, "so that it is computed"
    pipe.close()
    pipe = opened(owner, engine)
    assert pipe.retrieve(IDS, target.caches, at).wait().tokens == 200, "and its owner has it still"


def test_an_index_elsewhere_learns_what_cannot_be_read(opened: Open, tmp_path: Path) -> None:
    """It would plan the same load for every request."""
    engine = Engine(dim=32)
    at, target = engine.slots(200), engine.blank()
    pipe = opened(encoded(tmp_path, "aesgcm"), engine)
    pipe.store(IDS, engine.caches, at).wait()
    settle(pipe)
    pipe.close()
    source = encoded(tmp_path, "aesgcm")
    del source["graphs"]["retrieve"]["stages"]["grow"]["keys"]
    pipe = opened(source, engine, watch=True)
    there = {change.links[-32:] for change in pipe.changes(99) if change.kept}
    assert len(there) == 4
    for seen in (there, set()):
        assert pipe.retrieve(IDS, target.caches, at).wait().tokens == 0
        settle(pipe)
        gone = {(c.tier, c.kept, c.links[-32:]) for c in pipe.changes(99)}
        assert gone == {("warm", False, key) for key in seen}


def test_what_is_on_the_disk_cannot_be_read(opened: Open, tmp_path: Path) -> None:
    engine = Engine(dim=32)
    at = engine.slots(200)
    pipe = opened(encoded(tmp_path, "aesgcm"), engine)
    pipe.store(IDS, engine.caches, at).wait()
    settle(pipe)
    secret = Path(key_file(tmp_path)).read_bytes()
    assert secret not in (pipe.explain() + str(pipe.stats())).encode()
    pipe.close()
    row = engine.rows(at)[0, 0, 5].numpy().tobytes()
    kept = b"".join(p.read_bytes() for p in (tmp_path / "tier").rglob("*") if p.is_file())
    assert row not in kept
    assert secret not in kept


def test_heads_that_turboquant_cannot_rotate(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="have 24: use int4"):
        opened(encoded(tmp_path, "turboquant"), Engine(dim=24))
