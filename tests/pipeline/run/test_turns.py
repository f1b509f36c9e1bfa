"""Retrieves beside stores: neither memory nor threads keep them from what lies in memory."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch
from conftest import Engine, Open, config, settle, tokens, with_disk

from tierloom.pipeline.run.threads import Pool
from tierloom.stages.codecs.lossless.zstd import Zstd
from tierloom.stages.errors import Lost
from tierloom.stages.ops.gather import Gather
from tierloom.stages.ops.scatter import Scatter

IDS = tokens(256)
_LATER = ["copy", "gather", "encode"]


async def unreserve(pipe: Any, nbytes: int) -> None:
    pipe.arena.promises.unreserve(nbytes)


def test_what_somebody_waits_for_goes_first() -> None:
    pool, go, order = Pool(1, "test"), threading.Event(), []

    async def life() -> None:
        held = asyncio.create_task(pool(go.wait))
        await asyncio.sleep(0.05)
        calls = [
            asyncio.create_task(pool(order.append, word, later=_LATER.index(word)))
            for word in ("encode", "gather", "copy", "encode", "gather", "copy")
        ]
        await asyncio.sleep(0.05)
        go.set()
        await asyncio.gather(held, *calls)

    asyncio.run(life())
    pool.close()
    assert order == ["copy", "copy", "gather", "gather", "encode", "encode"]


def test_loads_go_before_stores(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, and four stores that asked for it first."""
    engine, target, go = Engine(), Engine().blank(), threading.Event()
    order: list[str] = []
    for cls in (Gather, Scatter):
        apply = cls.apply

        def noted(self: Any, batch: Any, apply: Any = apply) -> None:
            order.append(batch.request.graph)
            apply(self, batch)

        monkeypatch.setattr(cls, "apply", noted)
    pipe, at = opened(config(budget__threads=1), engine), engine.slots(256)
    pipe.store(IDS, engine.caches, at).wait()
    order.clear()
    held = pipe._portal.begin(pipe._worker._work, go.wait)
    stores = [pipe.store(IDS + n, engine.caches, at) for n in range(1, 5)]
    time.sleep(0.2)
    load = pipe.retrieve(IDS, target.caches, at)
    time.sleep(0.2)
    go.set()
    held.result(10)
    assert load.wait(10).tokens == 256
    assert all(store.wait(10).tokens == 256 for store in stores)
    assert order[0] == "retrieve"
    assert set(order[1:]) == {"store"}


def test_what_lies_in_memory_needs_no_promise(opened: Open) -> None:
    engine, target = Engine(), Engine().blank()
    pipe, at = opened(config(), engine), engine.slots(256)
    pipe.store(IDS, engine.caches, at).wait()
    pipe._portal.call(pipe.arena.promises.reserve, pipe.arena.working)
    assert pipe.retrieve(IDS, target.caches, at).wait(10).tokens == 256
    assert torch.equal(engine.rows(at), target.rows(at))
    pipe._portal.call(unreserve, pipe, pipe.arena.working)


@pytest.mark.parametrize("room", [True, False])
def test_what_has_gone_from_memory_needs_one(
    opened: Open, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    """Between plan and read it was evicted, and the disk has it: read if there is memory for it."""
    engine, target = Engine(), Engine().blank()
    pipe, at = opened(with_disk(tmp_path), engine), engine.slots(256)
    pipe.store(IDS, engine.caches, at).wait()
    monkeypatch.setattr(pipe.tiers["hot"].tier, "hold", lambda key: None)
    taken = 0 if room else pipe.arena.working
    pipe._portal.call(pipe.arena.promises.reserve, taken)
    got = pipe.retrieve(IDS, target.caches, at).wait(10)
    assert got.tokens == (256 if room else 0)
    assert got.tiers.keys() == ({"warm"} if room else set())
    assert room or Lost.NO_ROOM in got.lost
    assert not room or torch.equal(engine.rows(at), target.rows(at))
    pipe._portal.call(unreserve, pipe, taken)


def test_encoding_keeps_no_thread_for_long(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is a few frames: the pool's threads come back between them."""
    jobs: list[int] = []
    plain = Zstd._encode

    def counted(self: Any, job: Any) -> None:
        jobs.append(sum(p.chunk.object.header.frames[p.group].raw for p in job))
        plain(self, job)

    monkeypatch.setattr(Zstd, "_encode", counted)
    source = config(tiers__cold={"use": "blackhole"})
    source["budget"] = {"arena": "64 MiB"}
    source["graphs"]["store"]["stages"] |= {
        "host": {"use": "to_host", "from": "pack"},
        "small": {"use": "zstd"},
        "cold": {"use": "put", "tier": "cold", "when_full": "block"},
    }
    engine = Engine(heads=8, dim=128, blocks=70)
    pipe, at = opened(source, engine), engine.slots(1024)
    pipe.store(tokens(1024), engine.caches, at).wait(30)
    settle(pipe)
    assert sum(jobs) == 1024 * engine.layers * 2 * 8 * 128 * 2
    frame = 64 * 2 * 2 * 8 * 128 * 2
    assert max(jobs) <= (2 << 20) + frame


def test_a_slow_branch_gives_up_what_its_siblings_need(opened: Open) -> None:
    """Stores wait for memory: it drops what it has not begun, and memory keeps everything."""
    engine = Engine(heads=4, dim=64, blocks=40)
    slow = {"use": "mock", "latency": "600 ms", "timeout": "5 s"}
    source = config(tiers__cold=slow, budget__arena="2 MiB", tiers__hot__capacity="64 MiB")
    source["graphs"]["store"]["deadline"] = "20 s"
    source["graphs"]["store"]["stages"]["cold"] = {"use": "put", "tier": "cold", "from": "pack"}
    pipe, at = opened(source, engine), engine.slots(256)
    began = time.monotonic()
    prompts = [tokens(256, seed=n) for n in range(12)]
    waits = [pipe.store(ids, engine.caches, at) for ids in prompts]
    lost = [ticket.wait(60).lost for ticket in waits]
    assert all(pipe.lookup(ids) == 256 for ids in prompts), lost
    figures = pipe.stats()
    assert figures["graphs"]["store"]["dropped"] > 0, (lost, time.monotonic() - began)
    assert figures["tiers"]["cold"]["puts"] > 0
