"""Readers for whom what a store keeps is not meant: misses by a cause of their own, and for all
that they ask, nothing is gone: its owner reads it as before."""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xxhash
from conftest import Engine, settle
from kinds import DAMAGED, READ, kinds
from stores import IDS
from trips import PACES, get, lands

from tierloom import Lost
from tierloom.stages.codecs.cachegen import calibration
from tierloom.stages.codecs.cachegen.codebook import fitted, shapes

if TYPE_CHECKING:
    from conftest import Open
    from stores import Store

    from tierloom import Pipeline

Change = Callable[[bytearray], None]
_FRAME, _AT = struct.Struct("<QQQQ8s"), 200
"""A frame in a header, and where the first one stands."""


def secret(folder: Path, name: str) -> str:
    path = folder / name
    path.write_bytes(os.urandom(32))
    path.chmod(0o600)
    return str(path)


def calibrated(folder: Path, engine: Engine) -> str:
    """A calibration whose steps are one, so that whole numbers come back as they were."""
    channels = engine.heads * engine.dim
    tensors: dict[str, Any] = {
        "freqs": np.zeros(engine.dim // 2, np.float32),
        "means": np.zeros((2, engine.layers, channels), np.float32),
        "steps": np.ones((3, 2, engine.layers, channels), np.float32),
        "tabid": np.full((3, 2, engine.layers, channels), 12, np.uint8),
    } | {f"tables.{level}": fitted(shapes()) for level in calibration.LEVELS}
    words = {"dim": str(engine.dim), "models": "[]", "transformed": json.dumps([])}
    path = folder / "one.safetensors"
    path.write_bytes(calibration.safetensors_bytes(tensors, words))
    return str(path)


def later(raw: bytearray) -> None:
    struct.pack_into("<H", raw, 4, 4)


def later_magic(raw: bytearray) -> None:
    raw[3:4] = b"2"


def another_codec(raw: bytearray) -> None:
    """The first frame names one more, which nobody knows."""
    offset, stored, plain, check, codecs = _FRAME.unpack_from(raw, _AT)
    _FRAME.pack_into(raw, _AT, offset, stored, plain, check, codecs.rstrip(b"\0") + b"\xc8")


def another_geometry(raw: bytearray) -> None:
    """As many bytes, of another element type."""
    kinds = struct.unpack_from("<H", raw, 184)[0]
    struct.pack_into("<H", raw, 184, {1: 2, 2: 1}[kinds])


def another_prefix(raw: bytearray) -> None:
    """What encrypts a frame in its place does not open it in this one."""
    raw[96] ^= 1


CAUSES: dict[str, tuple[Lost, str, Change | None]] = {
    "no key": (Lost.NO_KEY, "aesgcm", None),
    "another's key": (Lost.NO_KEY, "aesgcm", None),
    "a key that does not open it": (Lost.WRONG_KEY, "aesgcm", another_prefix),
    "no calibration": (Lost.NO_CALIBRATION, "cachegen", None),
    "an unknown codec": (Lost.NO_CODEC, "", another_codec),
    "a later version": (Lost.NEWER, "", later),
    "a later format": (Lost.NEWER, "", later_magic),
    "another geometry": (Lost.BAD_LAYOUT, "", another_geometry),
}
"""What the reader says, how objects are written, and what is done to their headers."""


def resealed(raw: bytes, change: Change) -> bytes | None:
    """A value whose header was changed by somebody who knows how to write one; None: it has none.
    In Redis the first 24 bytes are a manifest's."""
    at = next((at for at in (0, 24) if raw[at : at + 4] == b"TLM1"), -1)
    if at < 0:
        return None
    (size,) = struct.unpack_from("<Q", raw, at + 8)
    page = bytearray(raw[at : at + size])
    change(page)
    struct.pack_into("<Q", page, 16, 0)
    struct.pack_into("<Q", page, 16, xxhash.xxh3_64_intdigest(page))
    return raw[:at] + bytes(page) + raw[at + size :]


@pytest.fixture
def engine() -> Engine:
    """KV of small whole numbers, which every codec here brings back as they are."""
    made = Engine(heads=4, dim=32, blocks=16)
    for t in made.flat:
        t.copy_(t.round() + 0.0)  # no zero is negative
    return made


def spec(store: Store, by: str, *, use: str = "", options: Any = None, **grow: Any) -> Any:
    """A pipeline over the store that writes by a codec, and decodes with what `grow` says."""
    made = store.config(by=by, order="canonical")
    stages, encode = made["graphs"]["store"]["stages"], {}
    if use:
        encode = {"host": {"use": "to_host"}, "small": {"use": use} | options}
    made["graphs"]["store"]["stages"] = {
        name: stage for name, stage in stages.items() if name != "cold"
    } | encode | {"cold": stages["cold"]}  # fmt: skip
    made["graphs"]["retrieve"]["stages"]["grow"] |= grow
    return made


def everything(store: Store, pipe: Pipeline) -> dict[Any, bytes]:
    return {name: store.get(pipe, name) for name in store.values(pipe)}


@kinds(READ)
@pytest.mark.parametrize("cause", CAUSES)
def test_what_is_not_for_a_reader_stays(
    over: Open, opened: Open, store: Store, engine: Engine, cause: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    code, use, change = CAUSES[cause]
    if store.sealed and change is not None:
        pytest.skip("nothing in it can be changed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known: dict[str, Any] = {}
    if use == "aesgcm":
        known = {"keys": [secret(tmp_path, "ours")]}
    elif use == "cachegen":
        known = {"calibrations": [calibrated(tmp_path, engine)]}
    options = {"calibration": known["calibrations"][0]} if use == "cachegen" else known

    def open_as(by: str, **grow: Any) -> Pipeline:
        monkeypatch.setattr(calibration, "_known", {})
        use_ = "" if use == "cachegen" and not grow else use
        return opened(spec(store, by, use=use_, options=options, **grow), engine, model=store.model)

    over(engine).close()  # sets the scene
    at = engine.slots(192)
    owner = open_as("request", **known)
    lands(owner, engine, at)
    right = {} if store.sealed else everything(store, owner)
    for name, raw in right.items():
        if change is not None and (made := resealed(raw, change)) is not None:
            store.set(owner, name, made)
    there = {} if store.sealed else everything(store, owner)
    assert (there != right) == (change is not None)
    owner.close()

    lacking = dict(known) if change is not None else {}
    if cause == "another's key":
        lacking = {"keys": [secret(tmp_path, "theirs")]}
    for by in PACES:
        reader = open_as(by, **lacking)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            lost = [get(reader, engine, at).lost for _ in range(3)]
        assert lost[0].get(code, 0) >= 1
        assert lost[0].keys() <= {code, Lost.BEHIND}
        assert lost[1:] == [{}, {}], "it is not asked for again"
        assert reader.lookup(IDS) == 0
        said = [r.getMessage() for r in caplog.records if "cannot be read here" in r.getMessage()]
        assert len(said) == 1
        assert "tier cold" in said[0]
        assert code.name in said[0]
        assert code.cure in said[0]
        receipt = reader.store(IDS, engine.caches, at).wait()
        assert not receipt.tiers.get("cold"), "nothing is put in the place of others'"
        settle(reader)
        figures: Any = reader.stats()["tiers"]["cold"]
        assert (figures["corrupt"], figures["puts"]) == (0, 0)
        assert figures[code.name.lower()] >= 1
        assert reader.tiers["cold"].reading.failures == 0, "it is no reason to leave a tier alone"
        assert store.sealed or everything(store, reader) == there, "something is gone"
        if by == PACES[-1]:
            for name, raw in right.items():
                if there[name] != raw:
                    store.set(reader, name, raw)
        reader.close()
    owner = open_as("request", **known)
    assert get(owner, engine, at).tokens == 192, "the owner reads all"
    owner.close()


@kinds(DAMAGED)
def test_damage_is_damage_to_whoever_reads(
    over: Open, opened: Open, store: Store, engine: Engine, tmp_path: Path
) -> None:
    """Also to him who has no key: a checksum tells it before any is asked for."""
    keys = {"keys": [secret(tmp_path, "ours")]}
    over(engine).close()  # sets the scene
    at = engine.slots(192)
    owner = opened(spec(store, "request", use="aesgcm", options=keys, **keys), engine,
                   model=store.model)  # fmt: skip
    lands(owner, engine, at)
    before = everything(store, owner)
    name, raw = next(
        (name, bytearray(raw)) for name, raw in before.items()
        if len(raw) > 4096 and (store.whole or b"TLM1" not in raw[:28])
    )  # fmt: skip
    raw[4196 if store.whole else 100] ^= 1
    store.set(owner, name, bytes(raw))
    owner.close()
    source = spec(store, "request")
    source["budget"] = {"arena": "16 MiB"}  # all of it goes in one batch, which is lost whole
    reader = opened(source, engine, model=store.model)
    lost = get(reader, engine, at).lost
    assert lost[Lost.CORRUPT] == 1
    assert lost[Lost.NO_KEY] == 2
    figures: Any = reader.stats()["tiers"]["cold"]
    assert (figures["corrupt"], figures["no_key"]) == (1, 2)
    reader.close()
    owner = opened(spec(store, "request", use="aesgcm", options=keys, **keys), engine,
                   model=store.model)  # fmt: skip
    assert owner.store(IDS, engine.caches, at).wait().tiers == {"cold": 1}, "one was dropped"
    settle(owner)
    assert get(owner, engine, at).tokens == 192
    owner.close()
