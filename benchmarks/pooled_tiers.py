"""CPU seconds per GB of the tiers that keep objects in a pool, beside their bare clients.

    make engines
    .venv/bin/python benchmarks/pooled_tiers.py [mooncake] [infinistore] [--json FILE]

Objects of Llama-3.1-8B: 32 layers, 8 KV heads of 128, bfloat16, 256 tokens, 32 MiB. Tier and bare
client take turns in one process, against one server, so that what the machine does meanwhile is
done to both. CPU time is that of this process, all threads of the client included; the server's is
shown beside it. Then the pool freezes, dies and comes back under requests. Bars: mooncake within
1.3 of its bare client; no retrieve later than its deadline and 50 ms; used again within 2 s.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

import tierloom
from tierloom import KVLayout
from tierloom.stages.arena import Arena
from tierloom.stages.geometry import Geometry
from tierloom.stages.object import Header, Object, header_size, plan_frames
from tierloom.stages.tiers.base import Read, TierContext
from tierloom.stages.tiers.infinistore import Infinistore, InfinistoreOptions
from tierloom.stages.tiers.mooncake import Mooncake, MooncakeOptions

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tiers"))
import pools  # noqa: E402

GEOMETRY = Geometry(kv=2, layers=32, heads=8, dim=128, dtype="bfloat16", block_tokens=1)
TOKENS, GRAIN, GROUP = 256, 32, 4
OBJECTS, ROUNDS = 4, 12
PIECE = 4 << 20
NAMESPACE = b"n" * 32


def objects_of(arena: Arena) -> list[Object]:
    """Sealed objects of random bytes."""
    made = []
    rng = np.random.default_rng(0)
    for _ in range(OBJECTS):
        links = rng.bytes(32 * (TOKENS // GRAIN))
        raw = [GEOMETRY.frame_bytes(GROUP, TOKENS)] * (GEOMETRY.layers // GROUP)
        size = header_size(len(raw), TOKENS // GRAIN)
        header = Header(
            key=links[-32:], namespace=NAMESPACE, parent=b"p" * 32, token_digest=b"t" * 32,
            tokens=TOKENS, grain=GRAIN, group=GROUP, geometry=GEOMETRY,
            frames=plan_frames(size, raw, raw), links=links,
        )  # fmt: skip
        obj = Object(header, arena.lease(header.nbytes))
        view = obj.lease.view
        view[:] = rng.bytes(header.nbytes)
        obj.seal([xxhash.xxh3_64_intdigest(view[f.offset :][: f.stored]) for f in header.frames])
        made.append(obj)
    return made


class Meter:
    """Seconds and CPU seconds of what is done inside, per GB."""

    def __init__(self, servers: list[int]) -> None:
        self.servers = servers
        self.wall: list[float] = []
        self.cpu = self.served = 0.0
        self.nbytes = 0

    def __enter__(self) -> None:
        self._begun = time.perf_counter(), time.process_time(), _cpu_of(self.servers)

    def __exit__(self, *_: object) -> None:
        wall, cpu, served = self._begun
        self.wall.append(time.perf_counter() - wall)
        self.cpu += time.process_time() - cpu
        self.served += _cpu_of(self.servers) - served

    def figures(self, nbytes: int) -> dict[str, float]:
        gb = nbytes * len(self.wall) / 1e9
        best = nbytes / min(self.wall) / 1e9
        return {
            "cpu_s_per_gb": self.cpu / gb,
            "server_s_per_gb": self.served / gb,
            "best_gbs": best,
        }


def _cpu_of(pids: list[int]) -> float:
    """CPU seconds so far, in ticks of 10 ms."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100


async def pool(fn: Any, *args: Any) -> Any:
    return await asyncio.to_thread(fn, *args)


async def turns(tier: Any, arena: Arena, servers: list[int], bare: Any) -> dict[str, Any]:
    """`bare(what, objects, round)` does with the client alone what the tier does."""
    objects = objects_of(arena)
    nbytes = sum(obj.header.nbytes for obj in objects)
    names = ("bare put", "bare get", "tier put", "tier get")
    meters = {name: Meter(servers) for name in names}
    await tier.open()
    for round_ in range(ROUNDS + 1):
        if round_ == 1:
            meters = {name: Meter(servers) for name in names}  # the first was to warm up
        if bare is not None:
            for what in ("put", "get"):
                with meters[f"bare {what}"]:
                    bare(what, objects, round_)
            bare("drop", objects, round_)
        with meters["tier put"]:
            assert await tier.put(objects) == [None] * len(objects)
        reads = [Read(obj.header.key, 1 << 30) for obj in objects]
        with meters["tier get"]:
            await tier.read(reads)
        for read, obj in zip(reads, objects, strict=True):
            assert read.object is not None, read.lost
            assert read.object.lease.view == obj.lease.view
            read.object.lease.release()
        assert await tier.drop([obj.header.key for obj in objects]) == len(objects)
    for obj in objects:
        obj.lease.release()
    await tier.close()
    return {name: meter.figures(nbytes) for name, meter in meters.items() if meter.wall}


def mooncake(folder: Path) -> dict[str, Any]:
    memory = pools.MooncakePool(folder, segment=1 << 30)
    arena = Arena(3 * OBJECTS * (33 << 20))
    tier = Mooncake(MooncakeOptions(url=memory.url), TierContext(arena, NAMESPACE, pool))
    target = arena.lease(OBJECTS * (32 << 20))

    def bare(what: str, objects: list[Object], round_: int) -> None:
        client, names, sources, targets = tier._client, [], [], []
        for n, obj in enumerate(objects):
            for at in range(0, obj.header.nbytes - 4096, PIECE):
                names.append(f"bare/{round_}/{n}/{at}")
                sources.append(obj.lease.address + 4096 + at)
                targets.append(target.address + n * (32 << 20) + at)
        sizes = [PIECE] * len(names)
        if what == "put":
            assert not any(client.batch_put_from(names, sources, sizes))
        elif what == "get":
            assert client.batch_get_into(names, targets, sizes) == sizes
        else:
            client.batch_remove(names, True)

    try:
        return asyncio.run(turns(tier, arena, [memory.owners[0].pid], bare))
    finally:
        target.release()
        memory.close()


LIBRARY = """
import sys, time, json, infinistore as inf, numpy as np
config = inf.ClientConfig(host_addr="127.0.0.1", service_port=int(sys.argv[1]),
                          connection_type=inf.TYPE_TCP, log_level="error")
c = inf.InfinityConnection(config); c.connect()
a = np.random.default_rng(0).integers(0, 255, int(sys.argv[2]), dtype=np.uint8)
piece, rounds = 1 << 20, int(sys.argv[3])
out = {"bare " + what: {"cpu_s_per_gb": 0.0, "best_gbs": 0.0} for what in ("put", "get")}
for n in range(rounds + 1):
    for what in ("put", "get"):
        b, p = time.perf_counter(), time.process_time()
        for at in range(0, a.nbytes, piece):
            if what == "put": c.tcp_write_cache(f"bare/{n}/{at}", a.ctypes.data + at, piece)
            else: got = c.tcp_read_cache(f"bare/{n}/{at}"); assert got.nbytes == piece
        one = out["bare " + what]
        if n:
            one["best_gbs"] = max(one["best_gbs"], a.nbytes / (time.perf_counter() - b) / 1e9)
            one["cpu_s_per_gb"] += (time.process_time() - p) / (a.nbytes * rounds / 1e9)
    c.delete_keys([f"bare/{n}/{at}" for at in range(0, a.nbytes, piece)])
print(json.dumps(out))
"""
"""The library that comes with InfiniStore, in the server's environment: pieces of 1 MiB. No key is
written twice: it would be evicted with its first value, and the library waits for ever for it."""


def infinistore(folder: Path) -> dict[str, Any]:
    server = pools.InfiniServer(folder)
    arena = Arena(3 * OBJECTS * (33 << 20))
    options = InfinistoreOptions(url=server.url)
    tier = Infinistore(options, TierContext(arena, NAMESPACE, pool))
    try:
        figures = asyncio.run(turns(tier, arena, [server.pid], None))
        python = str(pools.install_pooled.INFINISTORE / "bin" / "python")
        command = [python, "-c", LIBRARY, str(server.port), str(OBJECTS << 25), str(ROUNDS)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return figures | json.loads(shown.stdout.splitlines()[-1])
    finally:
        server.kill()


def faults(name: str, folder: Path) -> dict[str, float]:
    """How late a retrieve is when the pool freezes, and how long until it is used again.

    Deadline 300 ms; the tier's breaker as in the presets, but for its time limit of 500 ms.
    """
    server: Any
    if name == "mooncake":
        server = pools.MooncakePool(folder)
        victims = {"master": server.master, "owner": server.owners[0]}
        close = server.close
    else:
        server = pools.InfiniServer(folder)
        victims, close = {"server": server}, server.kill
    shape = (2, 40, 16, 2, 8)
    caches = [torch.ones(shape, dtype=torch.bfloat16) for _ in range(4)]
    layout = KVLayout.from_tensors(caches, order="2BNHD")
    graphs: Any = {
        "store": {"stages": {"host": None, "hot": None, "pool": {"from": "pack"}}},
        "retrieve": {
            "deadline": "300 ms",
            "stages": {"plan": {"tiers": ["pool"]}, "fetch": {"promote": None}},
        },
    }
    source = {
        "version": 1, "extends": name, "graphs": graphs,
        "tiers": {"hot": None, "pool": {"url": server.url}},
    }  # fmt: skip
    if name == "mooncake":
        source["tiers"]["pool"]["segment"] = 0
    tokens, at = np.arange(256, dtype=np.int32), np.arange(256)
    found = {}
    try:
        with tierloom.open(source, layout=layout, model="faults") as pipe:

            def works() -> bool:
                stored = pipe.store(tokens, caches, at).wait()
                return not stored.lost and pipe.retrieve(tokens, caches, at).wait().tokens == 256

            for who, victim in victims.items():
                while not works():
                    time.sleep(0.05)
                for how, stop, back in (
                    ("frozen", victim.pause, victim.resume),
                    ("killed", victim.kill, victim.start),
                ):
                    stop()
                    late = 0.0
                    for _ in range(20):
                        begun = time.perf_counter()
                        pipe.retrieve(tokens, caches, at).wait()
                        late = max(late, time.perf_counter() - begun - 0.3)
                    back()
                    begun = time.perf_counter()
                    while not works():
                        time.sleep(0.05)
                    found[f"{who} {how}: late by ms"] = 1000 * late
                    found[f"{who} {how}: used again after s"] = time.perf_counter() - begun
    finally:
        close()
    return found


def main() -> None:
    known = {"mooncake": mooncake, "infinistore": infinistore}
    wanted = [name for name in known if name in sys.argv] or list(known)
    results = {}
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = known[name](Path(folder))
        for what, figures in sorted(results[name].items()):
            print(f"{name:12} {what:9}", "  ".join(f"{k} {v:6.3f}" for k, v in figures.items()))
        with tempfile.TemporaryDirectory() as folder:
            results[name]["faults"] = faults(name, Path(folder))
        for what, figure in results[name]["faults"].items():
            print(f"{name:12} {what:40} {figure:8.2f}")
        for what in ("put", "get"):
            ours, theirs = (results[name][f"{who} {what}"] for who in ("tier", "bare"))
            print(f"{name:12} {what}: {ours['cpu_s_per_gb'] / theirs['cpu_s_per_gb']:.2f} of bare")
    if "--json" in sys.argv:
        Path(sys.argv[sys.argv.index("--json") + 1]).write_text(
            json.dumps(results, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
