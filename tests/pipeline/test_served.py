"""Pipelines over a server that hangs, dies and returns, and two of them over one store.

Afterwards (see `opened`) all leases are home, no request is open and the portal has ended.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import Engine, config, settle, tokens
from store_server import Process, process

from tierloom import Lost

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from conftest import Open

    from tierloom import Pipeline, Receipt

PACES = [None, {"by": "layer", "window": 1}]
N = 150


@pytest.fixture(params=["tcp", "unix", "shared"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(way: str, tmp_path: Path) -> Iterator[Process]:
    with process(tmp_path, listen=where(way, tmp_path)) as server:
        yield server


def where(way: str, folder: Path, port: int = 0) -> tuple[str, ...]:
    return (f"tcp://127.0.0.1:{port}" if way == "tcp" else f"unix://{folder}/socket",)


def remote(url: str, way: str, *, hot: bool = False, pace: Any = None, **more: Any) -> Any:
    """A pipeline whose only tier is the server's; `hot`: behind memory, to be promoted to."""
    cold = {
        "use": "server", "url": url, "share": way == "shared", "timeout": "300 ms", "fails": 2,
        "probe": "200 ms",
    } | more  # fmt: skip
    made = config(graphs__store__deadline="5 s", graphs__retrieve__deadline="800 ms")
    stages = made["graphs"]["store"]["stages"]
    stages["cold"] = {"use": "put", "tier": "cold", "when_full": "block"}
    made["tiers"]["cold"] = cold
    if hot:
        made["graphs"]["retrieve"]["stages"]["fetch"]["promote"] = "hot"
    else:
        del made["tiers"]["hot"], stages["hot"]
    if pace:
        made["graphs"]["store"]["pace"] = made["graphs"]["retrieve"]["pace"] = pace
    return made


def get(pipe: Pipeline, ids: np.ndarray, engine: Engine, at: np.ndarray) -> Receipt:
    """Retrieve, layer by layer, and compare what came."""
    target = engine.blank()
    wave = pipe.begin_retrieve(ids, target.caches, at)
    for i in range(engine.layers):
        wave.wait_layer(i)
    got = wave.wait()
    n = got.tokens
    if n:
        assert torch.equal(engine.rows(at[:n]), target.rows(at[:n])), "wrong bytes"
    else:
        assert all((t.view(torch.uint8) == 0xA5).all() for t in target.flat), "placed, not told"
    return got


@pytest.mark.parametrize("pace", PACES, ids=["by request", "by layer"])
def test_one_stores_and_the_other_finds_it(
    opened: Open, server: Process, way: str, pace: Any
) -> None:
    engine, ids = Engine(), tokens(N)
    at = engine.slots(N)
    one, two = (opened(remote(server.url, way, pace=pace), engine) for _ in range(2))
    assert get(two, ids, engine, at).tokens == 0
    stored = one.store(ids, engine.caches, at).wait()
    assert (stored.tokens, stored.lost) == (N, {})
    for _ in range(3):
        got = get(two, ids, engine, at)
        assert (got.tokens, got.lost, got.tiers) == (N, {}, {"cold": 3})
    stranger = opened(remote(server.url, way), engine, model="another")
    assert get(stranger, ids, engine, at).tokens == 0
    assert stranger.clear() == 0
    assert one.clear() == 3
    assert get(two, ids, engine, at).tokens == 0


def test_what_came_over_a_socket_is_promoted(opened: Open, server: Process, way: str) -> None:
    """What was lent is not: it lies in this host's memory already."""
    engine, ids = Engine(), tokens(N)
    at = engine.slots(N)
    one, two = (opened(remote(server.url, way, hot=True), engine) for _ in range(2))
    assert one.store(ids, engine.caches, at).wait().lost == {}
    assert get(two, ids, engine, at).tiers == {"cold": 3}
    settle(two)
    assert get(two, ids, engine, at).tiers == {"cold" if way == "shared" else "hot": 3}


@pytest.mark.parametrize("pace", PACES, ids=["by request", "by layer"])
@pytest.mark.parametrize("fault", ["hangs", "dies"])
def test_a_server_that_is_gone_costs_a_miss_and_comes_back(
    opened: Open, tmp_path: Path, way: str, fault: str, pace: Any
) -> None:
    engine = Engine()
    at = engine.slots(N)
    prompts = [tokens(N, seed=s) for s in range(3)]
    with process(tmp_path, listen=where(way, tmp_path)) as server:
        pipe = opened(remote(server.url, way, pace=pace), engine)
        for ids in prompts:
            assert pipe.store(ids, engine.caches, at).wait().lost == {}
        assert get(pipe, prompts[0], engine, at).tokens == N
        server.child.send_signal(signal.SIGSTOP) if fault == "hangs" else server.kill()
        for _ in range(2):
            for ids in prompts:
                begun = time.monotonic()
                got = get(pipe, ids, engine, at)
                assert time.monotonic() - begun < 10  # generous: 0.8 s on a loaded machine
                assert got.tokens == 0
        assert pipe.tiers["cold"]._failures >= 2, "its breaker is open"
        lost = pipe.store(tokens(N, seed=9), engine.caches, at).wait().lost
        assert lost.keys() <= {Lost.TIER_DOWN, Lost.LATE}
        if fault == "hangs":
            server.child.send_signal(signal.SIGCONT)
            assert found_again(pipe, prompts, engine, at)
            return
    port = int(server.url.rsplit(":", 1)[1]) if way == "tcp" else 0
    with process(tmp_path, listen=where(way, tmp_path, port)):
        end = time.monotonic() + 20
        while pipe.store(prompts[0], engine.caches, at).wait().lost:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert found_again(pipe, prompts[:1], engine, at)
        assert pipe.stats()["tiers"]["cold"]["restarts"] == 1
        settle(pipe)
        pipe.close()


def found_again(pipe: Pipeline, prompts: Any, engine: Engine, at: np.ndarray) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if all(get(pipe, ids, engine, at).tokens == N for ids in prompts):
            return True
        time.sleep(0.05)
    return False


def test_an_engine_starts_without_its_server(opened: Open, tmp_path: Path, way: str) -> None:
    engine, ids = Engine(), tokens(N)
    at = engine.slots(N)
    with process(tmp_path, listen=where(way, tmp_path)) as server:
        url = server.url
    pipe = opened(remote(url, way), engine)
    assert get(pipe, ids, engine, at).tokens == 0
    port = int(url.rsplit(":", 1)[1]) if way == "tcp" else 0
    with process(tmp_path, listen=where(way, tmp_path, port)):
        end = time.monotonic() + 20
        while pipe.store(ids, engine.caches, at).wait().lost:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert found_again(pipe, [ids], engine, at)


def test_killed_while_it_is_read(opened: Open, tmp_path: Path, way: str) -> None:
    """Again and again, at any moment: what was placed is right, or was not placed."""
    engine = Engine(layers=12)
    ids, at = tokens(320), engine.slots(320)
    pace, port, hits = {"by": "layer", "window": 1}, 0, 0
    pipe = None
    for round in range(5):
        with process(tmp_path, listen=where(way, tmp_path, port)) as server:
            if way == "tcp":
                port = int(server.url.rsplit(":", 1)[1])
            if pipe is None:
                pipe = opened(remote(server.url, way, pace=pace), engine)
            end = time.monotonic() + 20
            while pipe.store(ids, engine.caches, at).wait().lost:
                assert time.monotonic() < end
                time.sleep(0.05)
            hits += get(pipe, ids, engine, at).tokens == 320
            target = engine.blank()
            wave = pipe.begin_retrieve(ids, target.caches, at)
            for i in range(engine.layers):
                wave.wait_layer(i)
                if i == 2 * round:
                    server.kill()
            n = wave.wait().tokens
            assert n == 0 or torch.equal(engine.rows(at[:n]), target.rows(at[:n])), "wrong bytes"
    assert hits == 5
