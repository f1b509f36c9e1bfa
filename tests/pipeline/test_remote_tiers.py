"""Tiers that other processes and machines share, over real servers: shared, damaged, dead, hung.

Afterwards (see `opened`) all leases are home, no request is open and the portal has ended.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from buckets import KEY, NAME, SECRET, Gate, localbucket
from conftest import Engine, config, settle, tokens
from processes import need

if TYPE_CHECKING:
    from collections.abc import Iterator

    from buckets import Server
    from conftest import Open

    from tierloom import Pipeline

IDS = tokens(192)
SIZE = 4096 + 3 * 2 * 2 * 64 * 2 * 8 * 2


class Place:
    """A tier's options, where its objects lie as files, and the server that has them, if any."""

    def __init__(self, tier: dict[str, Any], files: Path, server: Server | None = None) -> None:
        self.tier, self.files, self.server = tier, files, server

    def config(self, **changes: Any) -> dict[str, Any]:
        """The tier alone. Time limits are far off: a busy machine is no failure."""
        far = {"graphs__store__deadline": "60 s", "graphs__retrieve__deadline": "60 s"}
        made = config(**(far | changes))
        made["tiers"] = {"cold": self.tier | {"timeout": "30 s", "probe": "100 ms"}}
        made["graphs"]["store"]["stages"]["hot"]["tier"] = "cold"
        return made

    def objects(self) -> list[Path]:
        return sorted(p for p in self.files.rglob("*") if p.is_file() and p.stat().st_size >= SIZE)


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[Place]:
    need("s3", "obstore")
    with localbucket(folder / "data") as server:
        tier = {"use": "s3", "url": f"s3://{NAME}/kv", "region": "us-east-1"}
        yield Place(tier | {"endpoint": server.url}, folder / "data" / NAME, server)


@contextlib.contextmanager
def nixl_obj(folder: Path) -> Iterator[Place]:
    need("nixl", "nixl_cu12")
    with s3(folder) as place:
        place.tier |= {"use": "nixl", "backend": "OBJ"}
        yield place


@contextlib.contextmanager
def nixl_posix(folder: Path) -> Iterator[Place]:
    need("nixl", "nixl_cu12")
    yield Place({"use": "nixl", "path": str(folder / "kv")}, folder / "kv")


@contextlib.contextmanager
def gds(folder: Path) -> Iterator[Place]:
    yield Place({"use": "gds", "path": str(folder / "kv")}, folder / "kv")


PLACES = {"s3": s3, "nixl-obj": nixl_obj, "nixl-posix": nixl_posix}
if importlib.util.find_spec("kvikio") is not None:  # in its own environment: see tests/tiers
    PLACES["gds"] = gds
SERVED = ["s3", "nixl-obj"]


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any) -> Iterator[Place]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # All but headers goes by NIXL, also of objects as small as these.
    monkeypatch.setattr("tierloom.stages.tiers.nixl_agent._SMALL", 4096)
    with PLACES[request.param](tmp_path) as made:
        yield made


everywhere = pytest.mark.parametrize("place", list(PLACES), indirect=True)
served = pytest.mark.parametrize("place", SERVED, indirect=True)
PACES = pytest.mark.parametrize("pace", ["request", "layer"])


def get(pipe: Pipeline, engine: Engine, at: np.ndarray) -> Any:
    """The receipt of a retrieve layer by layer, whose bytes were compared."""
    target = engine.blank()
    wave = pipe.begin_retrieve(IDS, target.caches, at)
    for i in range(engine.layers):
        wave.wait_layer(i)
    got = wave.wait()
    n = got.tokens
    assert n == 0 or torch.equal(engine.rows(at[:n]), target.rows(at[:n])), "wrong bytes"
    assert target.untouched(at)
    settle(pipe)
    return got


@everywhere
@PACES
def test_what_another_process_stored(opened: Open, place: Place, pace: str) -> None:
    source = place.config(graphs__retrieve__pace={"by": pace})
    script = Path(__file__).parent / "other_process.py"
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(source)],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {"tokens": 192, "tiers": {"cold": 3}}
    engine = Engine()
    pipe, at = opened(source, engine), engine.slots(192)
    got = get(pipe, engine, at)
    assert (got.tokens, got.lost, got.tiers) == (192, {}, {"cold": 3})
    assert pipe.store(IDS, engine.caches, at).wait().tiers == {}, "it is all there already"


@everywhere
@PACES
@pytest.mark.parametrize("kind", ["flip", "zero", "swap", "truncate", "lengthen", "empty"])
def test_damage(opened: Open, place: Place, kind: str, pace: str) -> None:
    engine, rng, misses = Engine(), np.random.default_rng(7), 0
    pipe = opened(place.config(graphs__retrieve__pace={"by": pace}), engine)
    at = engine.slots(192)
    for _ in range(5):
        assert pipe.store(IDS, engine.caches, at).wait().lost == {}
        settle(pipe)
        files = place.objects()
        assert len(files) == 3
        path = files[int(rng.integers(3))]
        raw = bytearray(path.read_bytes())
        spot = int(rng.integers(SIZE))
        if kind == "flip":
            raw[spot] ^= 1 << int(rng.integers(8))
        elif kind == "zero":
            raw[spot // 4096 * 4096 : spot // 4096 * 4096 + 4096] = bytes(4096)
        elif kind == "swap":
            other = files[(files.index(path) + 1) % 3]
            other_raw = other.read_bytes()
            other.write_bytes(raw)
            raw = bytearray(other_raw)
        elif kind == "truncate":
            raw = raw[: spot // 4096 * 4096]
        elif kind == "lengthen":
            raw += bytes(4096)
        else:
            raw = bytearray()
        path.write_bytes(raw)
        misses += get(pipe, engine, at).tokens < 192
        assert get(pipe, engine, at).tokens in (0, 64, 128, 192)
    assert misses
    assert pipe.stats()["tiers"]["cold"]["corrupt"] >= misses
    assert pipe.stats()["tiers"]["cold"]["available"], "damage is no reason to leave a tier alone"


@served
@PACES
@pytest.mark.parametrize("end", ["dead", "hung"])
def test_a_server_that_is_gone_and_comes_back(
    opened: Open, place: Place, end: str, pace: str
) -> None:
    engine = Engine()
    source = place.config(
        graphs__retrieve__pace={"by": pace},
        graphs__retrieve__deadline="500 ms",
        graphs__store__deadline="500 ms",
    )
    source["tiers"]["cold"] |= {"timeout": "200 ms", "fails": 2}
    pipe, at = opened(source, engine), engine.slots(192)
    for _ in range(20):  # half a second may not be enough on a machine that is busy
        if pipe.store(IDS, engine.caches, at).wait().lost == {}:
            break
    assert place.server is not None
    with contextlib.ExitStack() as stack:
        if end == "dead":
            place.server.kill()
        else:
            stack.enter_context(place.server.paused())
        for seed in range(6):
            began = time.monotonic()
            assert get(pipe, engine, at).tokens == 0
            assert time.monotonic() - began < 5  # generous: half a second, on a busy machine
            late = pipe.store(tokens(64, seed=seed + 1), engine.caches, engine.slots(64)).wait()
            assert late.tiers == {}
        assert not pipe.tiers["cold"].available or pipe.tiers["cold"]._failures >= 2
    if end == "dead":
        place.server.start()
    end_by = time.monotonic() + 20
    while get(pipe, engine, at).tokens < 192:
        assert time.monotonic() < end_by, "it never came back"


@served
@PACES
@pytest.mark.parametrize("after", [0, 30_000, 60_000])
def test_cancelled_while_bytes_are_on_their_way(
    opened: Open, place: Place, after: int, pace: str
) -> None:
    """The wire is shut when so many bytes have come; what comes later finds nobody."""
    assert place.server is not None
    gate, seen = Gate(place.server.port), [0]

    def count(data: bytes) -> bytes:
        seen[0] += len(data)
        if seen[0] > after and armed.is_set():
            gate.open.clear()
        return data

    armed = threading.Event()
    gate.change = count
    place.tier["endpoint"] = gate.url
    engine = Engine()
    pipe = opened(place.config(graphs__retrieve__pace={"by": pace}), engine)
    at = engine.slots(192)
    assert pipe.store(IDS, engine.caches, at).wait().lost == {}
    seen[0] = 0
    armed.set()
    target = engine.blank()
    ticket = pipe.begin_retrieve(IDS, target.caches, at)
    for _ in range(500):
        if not gate.open.is_set():
            break
        time.sleep(0.01)
    ticket.cancel()
    frozen = [t.clone() for t in target.flat]
    assert ticket.wait().tokens in (0, 64, 128, 192)
    armed.clear()
    gate.open.set()
    settle(pipe)
    assert all(torch.equal(a, b) for a, b in zip(frozen, target.flat, strict=True))
    assert get(pipe, engine, at).tokens == 192
    gate.close()


@served
def test_a_store_that_its_deadline_ends(opened: Open, place: Place) -> None:
    """Their memory is used again while the server still waits for them: none is seen torn."""
    assert place.server is not None
    gate = Gate(place.server.port)
    place.tier["endpoint"] = gate.url
    engine = Engine()
    source = place.config(graphs__store__deadline="400 ms")
    source["tiers"]["cold"]["fails"] = 1000
    pipe, at = opened(source, engine), engine.slots(192)
    for seed in range(1, 5):
        gate.asked = lambda data: gate.open.clear() if data.startswith(b"PUT") else None
        receipt = pipe.store(tokens(192, seed=seed), engine.caches, at).wait()
        assert not gate.open.is_set(), "the objects never set out"
        assert (receipt.tokens, receipt.tiers) == (0, {})
        gate.asked = None
        gate.open.set()
        settle(pipe)
    for _ in range(3):
        pipe.store(IDS, engine.caches, at).wait()
    assert get(pipe, engine, at).tokens == 192
    gate.close()
