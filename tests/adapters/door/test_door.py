"""One door in every process: its paths, what is ready, and that nothing is there without it."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from door_rig import HOT, asked, config, get, series

import tierloom
from tierloom.adapters.door.entrance import Entrance
from tierloom.adapters.door.http_door import HttpDoor
from tierloom.adapters.door.readiness import readiness
from tierloom.pipeline.admin.admin_bodies import BODIES

ROOT = Path(__file__).resolve().parents[3]
WEB = {"fastapi", "starlette", "uvicorn", "prometheus_client", "httpx", "opentelemetry", "h11"}


def test_the_paths() -> None:
    with asked(config()) as rig, tierloom.serve_http(rig.pipe) as door:
        rig.store(1, chunks=2)
        assert door.url.startswith("http://127.0.0.1:")
        for path in ("/livez", "/healthz", "/health"):
            assert get(door.url, path).json() == {"status": "alive"}
        assert get(door.url, "/readyz").json() == {"status": "ready", "reasons": []}
        said = get(door.url, "/v1/stats").json()
        assert said["version"] == tierloom.__version__
        assert said["status"] == "ready"
        assert said["parts"]["0"]["tiers"]["hot"]["puts"] == 2
        assert said["parts"]["0"]["measured"]["requests"]["store"]["tokens"] == 128
        paths = get(door.url, "/v1/openapi.json").json()["paths"]
        orders = {f"/v1/{order}" for order in BODIES} | {"/v1/orders/{id}"}
        assert set(paths) - orders == {
            "/livez", "/readyz", "/metrics", "/v1/stats", "/v1/stream",
        }  # fmt: skip
        assert orders <= set(paths)
        assert get(door.url, "/metrics").headers["content-type"].startswith("text/plain")
        said = get(door.url, "/metrics", headers={"accept": "application/openmetrics-text"})
        assert said.text.endswith("# EOF\n")
        assert get(door.url, "/nowhere").status_code == 404
        assert httpx.post(door.url + "/v1/stats", trust_env=False).status_code == 405
    with pytest.raises(httpx.ConnectError):
        get(door.url, "/livez")


def test_a_stream_tells_the_same_once_a_second_to_so_many() -> None:
    with asked(config()) as rig, tierloom.serve_http(rig.pipe) as door:
        with httpx.stream("GET", door.url + "/v1/stream", timeout=20, trust_env=False) as said:
            lines = (line for line in said.iter_lines() if line)
            first = json.loads(next(lines).removeprefix("data: "))
            rig.store(1)
            second = json.loads(next(lines).removeprefix("data: "))
        puts = [s["parts"]["0"]["tiers"]["hot"]["puts"] for s in (first, second)]
        assert puts == [0, 1]
        with contextlib.ExitStack() as streams:
            lines_of = []  # one that is dropped closes its stream
            for _ in range(16):
                stream = httpx.stream("GET", door.url + "/v1/stream", timeout=20, trust_env=False)
                lines_of.append(streams.enter_context(stream).iter_lines())
                next(lines_of[-1])
            assert get(door.url, "/v1/stream").status_code == 503
            assert get(door.url, "/livez").status_code == 200


def test_ready_before_while_and_after() -> None:
    """503 with the reason until it is open, where its first tier fails, and while it ends."""
    parts: dict[str, dict[str, object]] = {}

    async def read() -> dict[str, dict[str, object]]:
        return parts

    with asked(config()) as rig, HttpDoor(read, Entrance("127.0.0.1:0")).start() as door:

        def ready() -> tuple[int, str, list[str]]:
            said = get(door.url, "/readyz")
            return said.status_code, said.json()["status"], said.json()["reasons"]

        assert ready() == (503, "unready", ["nothing is open yet"])
        parts["0"] = rig.pipe.stats() | {"tiers": {}}
        assert ready() == (503, "unready", ["its tiers are not open yet"])
        parts["0"] = rig.pipe.stats()
        assert ready() == (200, "ready", [])
        parts["1"] = {"error": "worker 1 does not answer"}
        assert ready() == (503, "unready", ["part 1: worker 1 does not answer"])
        assert series(door.url)["tierloom_parts_silent",] == 1
        del parts["1"]
        door.draining = "it is about to end"
        assert ready() == (503, "unready", ["it is about to end"])
        assert series(door.url)["tierloom_ready",] == 0


def test_a_colder_tier_that_fails_is_degraded_the_first_is_not_ready() -> None:
    with asked(config(hot=HOT, cold=HOT)) as rig:
        for tier in ("cold", "hot"):
            rig.pipe.tiers[tier].writing.trip(OSError("no space"))
            told = readiness({"0": rig.pipe.stats()})
            assert told.status == "degraded"
            assert (
                f"tier {tier}: takes nothing since 2" in told.reasons[-1 if tier == "cold" else 0]
            )
        rig.pipe.tiers["cold"].trip(OSError("gone"))
        assert readiness({"0": rig.pipe.stats()}).status == "degraded"
        rig.pipe.tiers["hot"].trip(OSError("gone"))
        told = readiness({"0": rig.pipe.stats()})
        assert told.status == "unready"
        assert told.reasons[0].startswith("tier hot: reads fail since 2")
        assert len(told.reasons) == 1


def test_a_pipeline_that_is_closed_is_not_ready() -> None:
    with asked(config()) as rig, tierloom.serve_http(rig.pipe) as door:
        rig.pipe.close()
        assert get(door.url, "/readyz").json()["reasons"] == ["caching is off"]
        assert series(door.url)["tierloom_off",] == 1


def test_several_pipelines_become_one_in_metrics() -> None:
    with asked(config()) as one, asked(config()) as other:
        door = tierloom.serve_http([one.pipe, other.pipe])
        one.store(1, chunks=2), other.store(2, chunks=3)
        said = series(door.url)
        assert said["tierloom_tier_puts_total", "tier=hot"] == 5
        assert said["tierloom_store_size_bytes_count",] == 2
        assert said["tierloom_store_size_bytes_bucket", "le=+Inf"] == 2
        other.pipe.tiers["hot"].trip(OSError("gone"))
        assert series(door.url)["tierloom_tier_up", "direction=reads", "tier=hot"] == 0
        assert len(get(door.url, "/v1/stats").json()["parts"]) == 2
        with pytest.raises(tierloom.ConfigError, match=r"serve_http 127.0.0.1:\d+: Address"):
            tierloom.serve_http(one.pipe, door.url)
        door.close()


def test_counters_are_read_while_they_change() -> None:
    """No read fails, and none waits for a request: the loop that runs requests is held up here."""
    with asked(config()) as rig, tierloom.serve_http(rig.pipe) as door:
        go = threading.Event()
        rig.pipe._portal.post(go.wait)
        try:
            assert get(door.url, "/metrics").status_code == 200
            assert get(door.url, "/v1/stats").status_code == 200
        finally:
            go.set()
        with rig.pipe.tiers["hot"].tier._index.lock, rig.pipe.arena.lock:
            assert get(door.url, "/metrics").status_code == 200

        seeds = iter(range(10_000))
        end = time.monotonic() + 0.5

        async def read() -> None:
            while time.monotonic() < end:
                stats = await asyncio.to_thread(rig.pipe.stats)
                assert stats["measured"]["requests"]["store"]["requests"] >= 0

        reading = threading.Thread(target=lambda: asyncio.run(read()))
        reading.start()
        while reading.is_alive():
            rig.store(next(seeds))
        reading.join()


LIGHT = """
import sys, threading, torch, tierloom
caches = [torch.randn(2, 8, 16, 2, 8)]
layout = tierloom.KVLayout.from_tensors(caches, order="2BNHD")
pipe = tierloom.open("minimal", layout=layout, model="m", overrides={"tiers.hot.capacity": "8 MiB",
    "budget.arena": "8 MiB"})
pipe.store(list(range(128)), caches, list(range(128))).wait()
pipe.stats()
print(sorted(sys.modules))
print([t.name for t in threading.enumerate()])
pipe.close()
"""


def test_without_a_door_nothing_of_it_is_there() -> None:
    """No module, no thread, nobody who is told of a call."""
    run = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True, timeout=100
    )
    modules, threads = map(ast.literal_eval, run.stdout.splitlines())
    assert not {m.split(".")[0] for m in modules} & WEB
    assert not [m for m in modules if ".door" in m or m.endswith(".measures")]
    assert "tierloom-http" not in threads
    with asked(config()) as rig:
        assert all(tier.timed is None for tier in rig.pipe.tiers.values())
        assert rig.pipe.tiers["hot"].tier._index.lives is None
        assert "measured" not in rig.pipe.stats()


def test_web_and_telemetry_are_imported_by_adapters_alone() -> None:
    for folder in ("triton_kernels", "stages", "pipeline", "src/tierloom/testing"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                assert not {n.split(".")[0] for n in names} & WEB, path.name
