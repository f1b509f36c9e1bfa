"""Progressive objects: as fine as there is time for, and what was cut short is never kept so."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import torch
from conftest import Engine, settle, tokens
from test_every_codec import LOSS, encoded, lost_of

from tierloom.stages.ops.scan_budget import ScanBudget

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from conftest import Open

    from tierloom import Pipeline
    from tierloom.stages.tiers.contract.tier import Read

IDS = tokens(200)


def stored(opened: Open, folder: Path, engine: Engine, *more: str, **changes: Any) -> Pipeline:
    """Stored to memory and disk; memory is empty again."""
    pipe = opened(encoded(folder, "progressive", *more, **changes), engine)
    at = engine.slots(200)
    assert pipe.store(IDS, engine.caches, at).wait().tiers == {"hot": 4, "warm": 4}
    settle(pipe)
    pipe._portal.call(pipe.tiers["hot"].clear)
    engine.at = at  # type: ignore[attr-defined]
    return pipe


def scans_in_time(monkeypatch: pytest.MonkeyPatch, scans: int) -> None:
    """There is time for so many scans."""
    left = [scans - 1]

    def finer(self: ScanBudget, step: int, upto: int, now: float) -> bool:
        assert 0 < step < upto
        left[0] -= 1
        return left[0] >= 0

    monkeypatch.setattr(ScanBudget, "finer", finer)


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("scans", [1, 2, 3])
def test_what_there_is_no_time_for_is_not_read(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scans: int, layered: bool
) -> None:
    engine = Engine(dim=32)
    pace = {"graphs__retrieve__pace": {"by": "layer"}} if layered else {}
    pipe = stored(opened, tmp_path, engine, **pace)
    target, at = engine.blank(), engine.at
    scans_in_time(monkeypatch, scans)
    wave = (pipe.begin_retrieve if layered else pipe.retrieve)(IDS, target.caches, at)
    for layer in range(engine.layers if layered else 0):
        assert wave.wait_layer(layer) == 200
    got = wave.wait()
    assert (got.tokens, got.lost, got.tiers) == (200, {}, {"warm": 4})
    assert target.untouched(at)
    loss = lost_of(engine, target, at)
    assert LOSS["progressive"] * 3 ** (2 - scans) < loss < LOSS["progressive"] * 3 ** (3 - scans)
    settle(pipe)
    warm, hot = pipe.stats()["tiers"]["warm"], pipe.stats()["tiers"]["hot"]
    assert (warm["bytes_out"] < warm["nbytes"]) == (scans < 3)
    assert hot["objects"] == (4 if scans == 3 else 0), "what was cut short is not promoted"


def test_what_was_cut_short_comes_finer_the_next_time(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(dim=32)
    pipe = stored(opened, tmp_path, engine)
    target, at = engine.blank(), engine.at
    with monkeypatch.context() as patch:
        scans_in_time(patch, 1)
        assert pipe.retrieve(IDS, target.caches, at).wait().tokens == 200
    assert lost_of(engine, target, at) > 3 * LOSS["progressive"]
    for tier in ("warm", "hot"):
        assert pipe.retrieve(IDS, target.caches, at).wait().tiers == {tier: 4}
        assert lost_of(engine, target, at) < LOSS["progressive"]
        settle(pipe)


def slowly(pipe: Pipeline, bandwidth: float) -> None:
    """The disk tier's reads take as long as a link of so many bytes/s would."""
    tier = pipe.tiers["warm"].tier
    read = tier.read

    async def paced(reads: Sequence[Read]) -> None:
        before = [r.object.loaded if r.object else 0 for r in reads]
        bytes_before = sum(r.object.arrived for r in reads if r.object)
        await read(reads)
        nbytes = sum(r.object.arrived for r in reads if r.object) - bytes_before
        arrived = [r.object.loaded if r.object else 0 for r in reads]
        for r, n in zip(reads, before, strict=True):
            if r.object:
                r.object.loaded = n  # it is not there yet
        await anyio.sleep(nbytes / bandwidth)
        for r, n in zip(reads, arrived, strict=True):
            if r.object:
                r.object.loaded = n

    tier.read = paced  # type: ignore[method-assign]


def test_a_slow_link_brings_all_coarsely_in_time(opened: Open, tmp_path: Path) -> None:
    """The coarsest scans take half a second of eight; one scan more would take all of them."""
    engine = Engine(dim=32, layers=12)
    pipe = stored(opened, tmp_path, engine, graphs__retrieve__stages__fetch__within="4 s",
                  tiers__warm__timeout="20 s", graphs__retrieve__deadline="20 s")  # fmt: skip
    whole = pipe.stats()["tiers"]["warm"]["nbytes"]
    slowly(pipe, whole / 10)
    target, at = engine.blank(), engine.at
    began = time.monotonic()
    got = pipe.retrieve(IDS, target.caches, at).wait()
    assert (got.tokens, got.lost) == (200, {})
    assert time.monotonic() - began < 9.0
    assert lost_of(engine, target, at) > LOSS["progressive"]
    assert pipe.stats()["tiers"]["hot"]["objects"] == 0


def test_a_link_that_dies_while_finer_scans_come(opened: Open, tmp_path: Path) -> None:
    """What has come is used, at the time that was aimed at, and is right."""
    engine = Engine(dim=32)
    pipe = stored(opened, tmp_path, engine, graphs__retrieve__stages__fetch__within="1 s",
                  tiers__warm__timeout="20 s", graphs__retrieve__deadline="20 s")  # fmt: skip
    tier = pipe.tiers["warm"].tier
    read = tier.read

    async def dies(reads: Sequence[Read]) -> None:
        if any(r.object for r in reads):
            await anyio.sleep(60)
        await read(reads)

    tier.read = dies  # type: ignore[method-assign]
    target, at = engine.blank(), engine.at
    got = pipe.retrieve(IDS, target.caches, at).wait()
    assert (got.tokens, got.lost) == (200, {})
    assert got.seconds < 15
    assert 3 * LOSS["progressive"] < lost_of(engine, target, at) < 9 * LOSS["progressive"]


def test_what_is_quicker_to_compute_is_not_read(opened: Open, tmp_path: Path) -> None:
    engine = Engine(dim=32)
    pipe = stored(opened, tmp_path, engine, graphs__retrieve__stages__fetch__within="5 s",
                  graphs__retrieve__stages__plan__worth="always")  # fmt: skip
    target, at = engine.blank(), engine.at
    assert pipe.retrieve(IDS, target.caches, at).wait().tokens == 200
    settle(pipe)
    pipe._portal.call(pipe.tiers["hot"].clear)
    pipe.prefill_rate = 1e12
    got = pipe.retrieve(IDS, target.caches, at).wait()
    assert got.tokens == 0
    assert set(got.lost) == {next(iter(got.lost))}
    assert next(iter(got.lost)).name == "LATE"
    pipe.prefill_rate = 1e-3
    assert pipe.retrieve(IDS, target.caches, at).wait().tokens == 200


def test_behind_it_encryption(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every scan is encrypted for its own place."""
    engine = Engine(dim=32)
    pipe = stored(opened, tmp_path, engine, "aesgcm")
    for scans in (1, 2, 3):
        target, at = engine.blank(), engine.at
        with monkeypatch.context() as patch:
            scans_in_time(patch, scans)
            assert pipe.retrieve(IDS, target.caches, at).wait().tokens == 200
        assert lost_of(engine, target, at) < LOSS["progressive"] * 3 ** (3 - scans)
        settle(pipe)


def test_another_layer_group_reads_them(opened: Open, tmp_path: Path) -> None:
    engine = Engine(dim=32)
    stored(opened, tmp_path, engine).close()
    pipe = opened(encoded(tmp_path, "zstd", chunk__group=3), engine)
    target, at = engine.blank(), engine.at
    got = pipe.retrieve(IDS, target.caches, at).wait()
    assert (got.tokens, got.tiers) == (200, {"warm": 4})
    assert lost_of(engine, target, at) < LOSS["progressive"]


def test_a_group_that_is_not_finite_is_kept_as_it_is(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(dim=32)
    for cache in engine.caches[:2]:
        cache[:] = float("nan")
    pipe = stored(opened, tmp_path, engine)
    scans_in_time(monkeypatch, 1)
    target, at = engine.blank(), engine.at
    assert pipe.retrieve(IDS, target.caches, at).wait().tokens == 200
    kept, came = engine.rows(at), target.rows(at)
    assert torch.equal(kept[:, :2], came[:, :2])
    assert not torch.equal(kept[:, 2:], came[:, 2:])
