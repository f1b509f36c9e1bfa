"""The tier `peer` and an engine that serves, in two processes of this machine:

    PYTHONPATH=benchmarks .venv/bin/python -m remote.peers [--rounds N] [--stops N] [--idle SECONDS]

- 8 objects of 32 MiB, read and verified, beside as many bytes over bare sockets, verified alike; in
  turns, CPU of both processes.
- 8 connections that nobody uses: CPU of both processes.
- A peer that is stopped or killed at some moment of a retrieve: how much later than its deadline
  that ends, what a lookup costs after that, how soon the peer is found again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]
sys.path[:0] = [str(ROOT / "tests" / "pipeline"), str(ROOT / "tests" / "stages" / "tiers")]

import numpy as np  # noqa: E402
import xxhash  # noqa: E402
from conftest import Engine, config, tokens  # noqa: E402
from peer_process import engine  # noqa: E402
from remote.bare import SPACE, objects  # noqa: E402
from remote.clients import COUNT, SLOT  # noqa: E402
from remote.sockets import SENDER  # noqa: E402
from yardstick import GB, cpu_of, machine  # noqa: E402

import tierloom  # noqa: E402
from tierloom.pipeline.run.threads import Pool  # noqa: E402
from tierloom.stages.memory.arena import Arena  # noqa: E402
from tierloom.stages.tiers.contract.tier import Read, TierContext  # noqa: E402
from tierloom.stages.tiers.peers.options import PeerOptions  # noqa: E402
from tierloom.stages.tiers.peers.tier import Peer  # noqa: E402

HELD: dict[str, Any] = {
    "version": 1, "budget": {"arena": 9 * SLOT}, "graphs": {}, "serve": {"tiers": ["hot"]},
    "tiers": {"hot": {"use": "memory", "capacity": 9 * SLOT}},
}  # fmt: skip
DEADLINE = 0.3


async def copies(folder: Path, rounds: int, idle: float) -> dict[str, Any]:
    arena, pool = Arena((2 * COUNT + 1) * SLOT), Pool(2, "io")
    kept = objects(arena)
    file, size = folder / "objects", sum(o.header.nbytes for o in kept)
    file.write_bytes(b"".join(o.lease.view[: o.header.nbytes] for o in kept))
    with engine(folder, HELD, bare=True, space=SPACE.hex()) as other:
        assert other.tell(put=[str(file), [o.header.nbytes for o in kept]]) == [0] * COUNT
        options = PeerOptions(directory=[other.url], timeout=60, hedge=None, connections=8)
        tier = Peer(options, TierContext(arena, SPACE, pool))
        await tier.open()
        took: dict[str, list[float]] = {"bare": [], "peer": [], "verify": []}
        rates = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = str(listener.getsockname()[1])
            sender = subprocess.Popen(  # noqa: ASYNC220 (before anything is measured)
                [sys.executable, "-c", SENDER, port, str(size)]
            )
            sock, _ = listener.accept()
            into = arena.lease(size)
            for _ in range(rounds + 1):
                before = cpu_of(sender.pid) + time.process_time()
                bare(sock, into.view)
                checked = time.process_time()
                for obj, at in zip(kept, range(0, size, size // COUNT), strict=True):
                    verify(obj.header, into.view[at : at + obj.header.nbytes])
                took["verify"].append(time.process_time() - checked)
                await asyncio.sleep(0.05)
                took["bare"].append(cpu_of(sender.pid) + time.process_time() - before)
                before, begun = cpu_of(other.pid) + time.process_time(), time.perf_counter()
                await retrieved(tier, kept)
                rates.append(size / GB / (time.perf_counter() - begun))
                await asyncio.sleep(0.05)
                took["peer"].append(cpu_of(other.pid) + time.process_time() - before)
            sock.close()
            sender.wait(20)
            into.release()
        await asyncio.gather(*(tier.exists([obj.header.key]) for obj in kept))
        (holder,) = tier.holders.values()
        assert holder._client._pool is not None
        connections = len(holder._client._pool._idle)
        await asyncio.sleep(0.5)
        mine, theirs = time.process_time(), cpu_of(other.pid)
        await asyncio.sleep(idle)
        resting = (time.process_time() - mine) / idle, (cpu_of(other.pid) - theirs) / idle
        await tier.close()
    pool.close()
    per = {name: statistics.median(each[1:]) / (size / GB) for name, each in took.items()}
    ratios = [p / b for p, b in zip(took["peer"][1:], took["bare"][1:], strict=True)]
    return {
        "cpu_s_per_gb": per, "ratio": statistics.median(ratios), "ratios": sorted(ratios),
        "gb_per_s": statistics.median(rates[1:]), "connections": connections,
        "idle_cpu_s_per_s": {"reader": resting[0], "holder": resting[1]},
    }  # fmt: skip


def bare(sock: socket.socket, into: memoryview) -> None:
    sock.sendall(b"g")
    at = 0
    while at < len(into):
        at += sock.recv_into(into[at : at + (1 << 20)])


def verify(header: Any, view: memoryview) -> int:
    """Frames whose checksum fails; of bare bytes all do."""
    frames = [view[f.offset : f.offset + f.stored] for f in header.frames]
    pairs = zip(frames, header.frames, strict=True)
    return sum(xxhash.xxh3_64_intdigest(raw) != frame.checksum for raw, frame in pairs)


async def retrieved(tier: Peer, kept: list[Any]) -> None:
    """As a request's batch of 32 MiB does it: one object after another."""
    for obj in kept:
        read = Read(obj.header.key, 1 << 30)
        await tier.read([read])
        assert read.object is not None, read.lost
        assert verify(read.object.header, read.object.lease.view) == 0
        read.object.lease.release()


def stops(folder: Path, count: int) -> dict[str, Any]:
    """Seconds beyond the deadline; of lookups while the peer is left alone; until it is back."""
    rig = Engine(layers=24, heads=8, dim=64)
    serve = config(serve={"tiers": ["hot"]}, tiers__hot__capacity="64 MiB", budget__arena="32 MiB")
    shape = {"layers": 24, "heads": 8, "dim": 64}
    with engine(folder, serve, engine=shape) as other:
        source = config(
            tiers__near={
                "use": "peer", "directory": [other.url], "timeout": "200 ms", "probe": "500 ms",
            },
            budget__arena="32 MiB", graphs__retrieve__deadline=f"{DEADLINE * 1e3:g} ms",
        )  # fmt: skip
        source["graphs"]["retrieve"]["stages"]["plan"] = {"use": "lookup", "tiers": ["near"]}
        with tierloom.open(source, layout=rig.layout, model="test") as pipe:
            return _stops(pipe, rig, other, count)


class Sleeper:
    """How late a thread wakes up that does nothing else: the machine's part in what comes late."""

    def __init__(self) -> None:
        self.late = 0.0
        threading.Thread(target=self._sleep, daemon=True).start()

    def _sleep(self) -> None:
        while True:
            begun = time.perf_counter()
            time.sleep(0.005)
            self.late = max(self.late, time.perf_counter() - begun - 0.005)


def _stops(pipe: Any, rig: Engine, other: Any, count: int) -> dict[str, Any]:
    ids, at, rng = tokens(192, seed=1), rig.slots(192), random.Random(0)
    over: dict[str, list[tuple[float, float]]] = {"stopped": [], "killed": []}
    sleeper = Sleeper()
    misses, again, wrong = [], [], 0
    other.stores(1)
    right = rig.rows(Engine(layers=24, heads=8, dim=64).slots(192))

    def found() -> bool:
        nonlocal wrong
        target = rig.blank()
        got = pipe.retrieve(ids, target.caches, at).wait()
        came = target.rows(at)[:, :, : got.tokens]
        wrong += not np.array_equal(came, right[:, :, : got.tokens])
        return bool(got.tokens == 192)

    for turn in range(count):
        while not found():
            time.sleep(0.02)
        end = "killed" if turn % 10 == 9 else "stopped"
        target, act = rig.blank(), other.kill if end == "killed" else other.pause
        timer = threading.Timer(rng.uniform(0, 0.02), act)
        timer.start()
        while True:
            begun, sleeper.late = time.perf_counter(), 0.0
            got = pipe.retrieve(ids, target.caches, at).wait()
            seconds = time.perf_counter() - begun
            over[end].append((seconds - DEADLINE, sleeper.late))
            wrong += not np.array_equal(
                target.rows(at)[:, :, : got.tokens], right[:, :, : got.tokens]
            )
            if not timer.is_alive() and got.tokens < 192:
                break
        timer.join()
        tier = pipe.tiers["near"].tier
        while tier.healthy:
            pipe.retrieve(ids, target.caches, at).wait()
        for _ in range(5):
            begun = time.perf_counter()
            pipe.begin_lookup(ids).result()
            misses.append(time.perf_counter() - begun)
        if end == "killed":
            other.start()
        else:
            other.resume()
        begun = time.perf_counter()
        while not tier.healthy:
            time.sleep(0.002)
        again.append(time.perf_counter() - begun)
        if end == "killed":
            other.stores(1)
    return {
        "most_beyond_deadline_ms": {k: max(v)[0] * 1e3 for k, v in over.items() if v},
        "a_sleeper_then_ms": {k: max(v)[1] * 1e3 for k, v in over.items() if v},
        "late": sum(seconds > 0.05 for v in over.values() for seconds, _ in v),
        "retrieves": {k: len(v) for k, v in over.items()}, "wrong": wrong,
        "lookup_while_alone_ms": {"p50": statistics.median(misses) * 1e3, "max": max(misses) * 1e3},
        "found_again_s": {"p50": statistics.median(again), "max": max(again)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="remote.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--stops", type=int, default=200)
    parser.add_argument("--idle", type=float, default=30.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    given = parser.parse_args()
    run: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT / "benchmarks") as made:
        run["copies"] = asyncio.run(copies(Path(made), given.rounds, given.idle))
        if given.stops:
            run["stops"] = stops(Path(made) / "stops", given.stops)
    print(json.dumps(run, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
