"""What is exported is what happened: every counter against a count by hand."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from door_rig import CHUNK, HOT, OBJECT_KV, Asked, asked, config, get, series
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from servers import redis

import tierloom
from tierloom.adapters.door.collector import FiguresCollector, exposition
from tierloom.pipeline.run.measures import SampledLives
from tierloom.stages.errors import Lost


def forget_hot(rig: Asked) -> None:
    """Memory is emptied, so that what is kept elsewhere is read there."""
    rig.pipe._portal.call(rig.pipe.tiers["hot"].clear)


def test_200_requests_with_a_redis_that_is_killed_among_them() -> None:
    with redis() as server:
        cold = {
            "use": "redis", "url": f"redis://127.0.0.1:{server.port}/0", "timeout": "20 s",
            "fails": 1000,
        }  # fmt: skip
        with asked(config(hot=HOT, cold=cold)) as rig, tierloom.serve_http(rig.pipe) as door:
            for seed in range(60):  # 3 chunks each, into both
                assert rig.store(seed, 3).lost == {}
            for seed in range(60):  # out of memory
                assert rig.retrieve(seed, 3).tiers == {"hot": 3}
            forget_hot(rig)
            for seed in range(20):  # out of Redis, and into memory again
                assert rig.retrieve(seed, 3).tiers == {"cold": 3}
            server.kill()
            for seed in range(100, 120):  # into memory alone
                receipt = rig.store(seed, 2)
                assert receipt.tiers == {"hot": 2}
                assert receipt.lost == {Lost.TIER_DOWN: 2}
            for seed in range(40, 60):  # these were in Redis alone
                assert rig.retrieve(seed, 3).tokens == 0
            server.start()
            for seed in range(200, 220):
                assert rig.store(seed, 1).lost == {}
            said, stats = series(door.url), rig.pipe.stats()

    stores, retrieves = rig.receipts["store"], rig.receipts["retrieve"]
    assert len(stores) + len(retrieves) == 200
    by_hand: dict[tuple[str, ...], float] = {
        ("tierloom_stores_total",): 100,
        ("tierloom_store_tokens_total",): (60 * 3 + 20 * 2 + 20) * CHUNK,
        ("tierloom_store_bytes_total",): (60 * 3 + 20 * 2 + 20) * OBJECT_KV,
        ("tierloom_store_duration_seconds_count",): 100,
        ("tierloom_store_size_bytes_count",): 100,
        ("tierloom_store_size_bytes_bucket", "le=65536.0"): 100,
        ("tierloom_loads_total",): 100,
        ("tierloom_asked_tokens_total",): 100 * 3 * CHUNK,
        ("tierloom_load_tokens_total",): 80 * 3 * CHUNK,
        ("tierloom_load_bytes_total",): 80 * 3 * OBJECT_KV,
        ("tierloom_load_duration_seconds_count",): 100,
        ("tierloom_hit_tokens_total", "tier=hot"): 60 * 3 * CHUNK,
        ("tierloom_hit_tokens_total", "tier=cold"): 20 * 3 * CHUNK,
        ("tierloom_tier_hits_total", "tier=hot"): 180,
        ("tierloom_tier_hits_total", "tier=cold"): 60,
        ("tierloom_tier_puts_total", "tier=hot"): 180 + 60 + 40 + 20,
        ("tierloom_tier_puts_total", "tier=cold"): 180 + 20,
        ("tierloom_tier_evictions_total", "tier=hot"): 0,
        ("tierloom_tier_corrupt_total", "tier=cold"): 0,
        ("tierloom_tier_objects", "tier=hot"): 60 + 40 + 20,
        ("tierloom_tier_up", "direction=reads", "tier=cold"): 1,
        ("tierloom_arena_bytes", "use=flight"): 0,
        ("tierloom_stage_chunks_total", "graph=store", "stage=hot"): 240,
        ("tierloom_stage_broken_total", "graph=store", "stage=cold"): 0,
        ("tierloom_wire_dropped_chunks_total", "graph=store", "wire=cold"): 0,
        ("tierloom_graph_requests", "graph=store"): 0,
        ("tierloom_ready",): 1,
        ("tierloom_degraded",): 0,
    }
    assert {key: said[key] for key in by_hand} == by_hand
    lost = Counter[Lost]()
    for receipt in (*stores, *retrieves):
        lost.update(receipt.lost)
    assert lost == {Lost.TIER_DOWN: 40}
    told = {c: said["tierloom_lost_chunks_total", f"cause={c.name.lower()}"] for c in Lost}
    assert {c: n for c, n in told.items() if n} == lost
    seconds = pytest.approx(sum(r.seconds for r in retrieves))
    assert said["tierloom_load_seconds_total",] == seconds
    used = stats["tiers"]["hot"]["nbytes"]
    assert said["tierloom_tier_used_bytes", "tier=hot"] == used > 120 * OBJECT_KV
    assert said["tierloom_tier_capacity_bytes", "tier=hot"] == 32 << 20
    reads = said["tierloom_tier_call_bytes_sum", "direction=reads", "tier=cold"]
    assert (
        reads == said["tierloom_tier_bytes_total", "direction=out", "tier=cold"] >= 60 * OBJECT_KV
    )


def test_a_tier_that_is_down_says_since_when() -> None:
    with redis() as server:
        url = f"redis://127.0.0.1:{server.port}/0"
        cold = {"use": "redis", "url": url, "fails": 1, "probe": "60 s"}
        with asked(config(hot=HOT, cold=cold)) as rig, tierloom.serve_http(rig.pipe) as door:
            rig.store(1)
            before = time.time()
            server.kill()
            rig.store(2)
            said = series(door.url)
            assert said["tierloom_tier_up", "direction=reads", "tier=cold"] == 0
            since = said["tierloom_tier_down_since_seconds", "direction=reads", "tier=cold"]
            assert before <= since <= time.time()
            assert said["tierloom_tier_down_since_seconds", "direction=reads", "tier=hot"] == 0
            assert said["tierloom_degraded",] == 1
            ready = get(door.url, "/readyz")
            assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
            assert str(server.port) not in ready.text  # no address goes to everybody


def test_lives_of_objects() -> None:
    """Memory for three objects: what is evicted and put again was regretted."""
    with asked(config()) as probe:
        probe.store(1)
        size = probe.pipe.stats()["tiers"]["hot"]["nbytes"]
    small = {"use": "memory", "capacity": 3 * size}
    with asked(config(hot=small)) as rig, tierloom.serve_http(rig.pipe) as door:
        for seed in (1, 2, 3):
            rig.store(seed)
        rig.retrieve(1)  # a use
        rig.store(4)  # evicts 2
        rig.store(2)  # wanted again; evicts 3
        said = series(door.url)
        assert said["tierloom_tier_evictions_total", "tier=hot"] == 2
        assert said["tierloom_object_evictions_total", "tier=hot"] == 2
        assert said["tierloom_object_regrets_total", "tier=hot"] == 1
        assert said["tierloom_object_age_seconds_count", "tier=hot"] == 2
        assert said["tierloom_object_idle_seconds_count", "tier=hot"] == 2
        assert said["tierloom_object_reuse_seconds_count", "tier=hot"] == 1


def key(n: int) -> bytes:
    return n.to_bytes(32, "little")[::-1]  # the last bytes choose


def test_lives_by_the_clock_and_by_sample() -> None:
    now = [0.0]
    lives = SampledLives(clock=lambda: now[0])
    lives.came(key(1)), lives.came(key(2)), lives.came(key(3))
    now[0] = 30.0
    lives.used([key(1), key(9)])
    now[0] = 100.0
    lives.evicted(key(1)), lives.went(key(2)), lives.evicted(key(2))
    said = lives.read()
    assert (said["evicted"], said["regretted"]) == (1, 0)
    assert (said["age"]["sum"], said["idle"]["sum"], said["gap"]["sum"]) == (100.0, 70.0, 30.0)
    lives.came(key(2)), lives.came(key(1))  # one was deleted, one was evicted
    assert lives.read()["regretted"] == 1
    for n in range(10, 100_000):
        lives.came(key(n))
    assert 1024 <= len(lives._lives) <= 4096
    for n in range(10, 100_000):
        lives.evicted(key(n))
    assert len(lives._gone) <= 4096


def test_series_are_few_and_do_not_grow() -> None:
    """Four tiers, and 500 tenants."""
    kinds = {name: {"use": "memory", "capacity": "8 MiB"} for name in ("warm", "cool", "cold")}
    with asked(config(hot=HOT, **kinds)) as rig, tierloom.serve_http(rig.pipe) as door:
        rig.store(1), rig.retrieve(1)
        before = series(door.url)
        ids = np.arange(CHUNK, dtype=np.int32)
        for tenant in range(500):
            names = {"salt": f"tenant {tenant}"}
            rig.pipe.store(ids, rig.caches, np.arange(CHUNK), **names).wait()
        after = series(door.url)
    assert after.keys() == before.keys()
    assert len(after) <= 500


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text;version=1.0.0", "*/*"])
def test_what_is_written_is_what_the_library_writes(accept: str) -> None:
    """Byte for byte: all families, large numbers, labels that must be escaped."""
    with asked(config(hot=HOT)) as rig:
        rig.pipe.measure()
        rig.store(1, 3), rig.retrieve(1, 3)
        figures = rig.pipe.stats()
    figures["tiers"]['a "b"\\c\nd'] = figures["tiers"]["hot"] | {
        "hits": 12_345_678,
        "latency": 1e-9,
    }
    figures["measured"]["requests"]["store"]["sizes"]["counts"][3] = 7_654_321
    figures["measured"]["lost"]["x"] = float("inf")
    own = {"certificate_ends_seconds": ("The end.", 1.7e9), "ready": ("Ready.", 1.0)}
    collector = FiguresCollector(lambda: {"0": figures, "1": figures}, own=own)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    encode, kind = choose_encoder(accept)
    text, said = exposition(collector, accept)
    assert said == kind
    assert text.decode().splitlines() == encode(registry).decode().splitlines()
    assert text == encode(registry)
