"""A pipeline over a real Redis: damage is a miss, a server that hangs costs the deadline."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import Engine, config, settle, tokens
from servers import ask, redis

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Open
    from processes import Process as Server

    from tierloom import Pipeline

IDS = tokens(192)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with redis() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    ask(running.port, "FLUSHALL")
    return running


def with_redis(server: Server, **changes: Any) -> dict[str, Any]:
    """Redis alone, or behind memory where `hot` is said."""
    url = f"redis://127.0.0.1:{server.port}"
    cold = {"use": "redis", "url": url, "timeout": "400 ms", "probe": "100 ms", "piece": "64 KiB"}
    made = config(tiers__cold=cold, **changes)
    for graph in made["graphs"].values():
        graph.setdefault("deadline", "2 s")
    made["graphs"]["store"]["stages"]["cold"] = {"use": "put", "tier": "cold", "when_full": "block"}
    del made["tiers"]["hot"], made["graphs"]["store"]["stages"]["hot"]
    return made


def never_wrong(pipe: Pipeline, engine: Engine, at: np.ndarray, ids: np.ndarray = IDS) -> int:
    """Retrieve layer by layer; check what came; how many tokens."""
    target = engine.blank()
    ticket = pipe.begin_retrieve(ids, target.caches, at)
    for i in range(engine.layers):
        ticket.wait_layer(i)
    n = ticket.wait().tokens
    assert n == 0 or torch.equal(engine.rows(at[:n]), target.rows(at[:n])), "wrong bytes"
    settle(pipe)
    return n


def keys(server: Server) -> list[str]:
    return sorted(w for w in ask(server.port, "KEYS", "*").split("\r\n")[2::2] if w)


@pytest.mark.parametrize("kind", ["flip", "cut", "longer", "gone", "swap"])
@pytest.mark.parametrize("layered", [False, True], ids=["whole", "layered"])
def test_damage(opened: Open, server: Server, kind: str, layered: bool) -> None:
    engine, rng, misses = Engine(heads=4, dim=32), np.random.default_rng(5), 0
    pace = {"by": "layer", "window": 1} if layered else {"by": "request"}
    pipe = opened(with_redis(server, graphs__retrieve__pace=pace), engine)
    at = engine.slots(192)
    for _ in range(4):
        assert pipe.store(IDS, engine.caches, at).wait().tokens == 192
        settle(pipe)
        assert never_wrong(pipe, engine, at) == 192
        names = keys(server)
        assert len(names) == 3 * (1 + 3), "three chunks, each of a manifest and three pieces"
        name, other = (names[i] for i in rng.choice(len(names), 2, replace=False))
        if kind == "swap":
            ask(server.port, "RENAME", name, "aside")
            ask(server.port, "RENAME", other, name)
            ask(server.port, "RENAME", "aside", other)
        elif kind == "gone":
            ask(server.port, "UNLINK", name)
        elif kind == "longer":
            ask(server.port, "APPEND", name, "x" * int(rng.integers(1, 100_000)))
        else:
            raw = bytearray(ask(server.port, "GET", name).encode("latin-1").split(b"\r\n", 1)[1])
            where = int(rng.integers(len(raw) - 2))
            raw[where] ^= 1 << int(rng.integers(8))
            ask(server.port, "SET", name, bytes(raw[: where if kind == "cut" else -2]))
        n = never_wrong(pipe, engine, at)
        assert n in (0, 64, 128, 192)
        misses += n < 192
        ask(server.port, "FLUSHALL")
    assert misses >= 2, "the damage never hit anything"


@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_a_server_that_goes_and_comes_back(opened: Open, how: str) -> None:
    engine = Engine()
    with redis() as server:
        pipe = opened(with_redis(server, graphs__retrieve__deadline="300 ms"), engine)
        at, guarded = engine.slots(192), pipe.tiers["cold"]
        pipe.store(IDS, engine.caches, at).wait()
        assert never_wrong(pipe, engine, at) == 192
        server.pause() if how == "hangs" else server.kill()
        late = 0.0
        for seed in range(6):
            target = engine.blank()
            ticket = pipe.retrieve(IDS, target.caches, at)
            begun = time.monotonic()
            assert ticket.wait().tokens == 0
            late = max(late, time.monotonic() - begun - 0.3)
            assert target.untouched(np.array([], int))
            lost = pipe.store(tokens(64, seed=seed), engine.caches, at[:64]).wait().lost
            assert lost
        print(f"{how}: a retrieve ended {1e3 * late:+.0f} ms after its deadline, at most")
        assert late < 5  # generous: a loaded machine
        settle(pipe)
        assert not guarded.available or guarded._failures >= 3, "the breaker must have opened"
        server.resume() if how == "hangs" else server.start()
        begun = time.monotonic()
        while pipe.store(IDS, engine.caches, at).wait().lost and time.monotonic() < begun + 20:
            time.sleep(0.02)
        print(f"{how}: stores land {time.monotonic() - begun:.2f} s after it is back")
        settle(pipe)
        assert never_wrong(pipe, engine, at) == 192


def test_torture(opened: Open) -> None:
    """Requests given up at random, over a server that is paused and killed now and then."""
    rng, engine = np.random.default_rng(0), Engine(blocks=80)
    pace = {"by": "layer", "window": 1}
    with redis("--maxmemory", "3mb", "--maxmemory-policy", "allkeys-random") as server:
        source = with_redis(server, graphs__store__pace=pace, graphs__retrieve__pace=pace)
        source["tiers"]["cold"] |= {"timeout": "150 ms", "stall": "100 ms"}
        pipe = opened(source, engine)
        prompts = [tokens(int(rng.integers(1, 400)), seed=s) for s in range(12)]
        slots = [engine.slots(len(p)) for p in prompts]
        truth = [engine.rows(s) for s in slots]
        end, rounds, hits = time.monotonic() + 8, 0, 0
        while time.monotonic() < end and rounds < 400:
            rounds += 1
            if rounds % 20 == 10:
                server.pause()
            elif rounds % 20 == 13:
                server.resume()
            elif rounds % 100 == 99:
                server.kill()
                server.start()
            k = int(rng.integers(len(prompts)))
            ids, at = prompts[k], slots[k]
            if rng.random() < 0.5:
                ticket = pipe.begin_store(ids, engine.caches, at)
                for i in range(int(rng.integers(engine.layers + 1))):
                    ticket.layer_done(i)
                ticket.cancel() if rng.random() < 0.3 else ticket.wait(0.2)
                continue
            target = engine.blank()
            wave = pipe.begin_retrieve(ids, target.caches, at)
            for i in range(int(rng.integers(engine.layers + 1))):
                wave.wait_layer(i)
            if rng.random() < 0.3:
                wave.cancel()
            got = wave.wait(0.2)
            hits += got.tokens > 0
            assert torch.equal(target.rows(at)[:, :, : got.tokens], truth[k][:, :, : got.tokens])
        server.resume()
        settle(pipe)
        assert rounds > 20
        assert hits, "nothing was ever read"
