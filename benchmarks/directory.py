"""The directory of many engines at 10^6 chunks: find, announce, memory, many workers, and loss.

    PYTHONPATH=benchmarks python benchmarks/directory.py [--chunks 1000000] [--only find ...]

Real servers on this machine. CPU is the server's or the process's own, by the clock of the process,
and says more than wall time on a machine that others use. What is found is compared with what was
announced; a figure over wrong answers is not printed. `bars`: in brackets behind each figure.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import resource
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]
sys.path.append(str(ROOT / "tests" / "stages" / "tiers"))

import servers  # noqa: E402
import store_server  # noqa: E402
from yardstick import cpu_of, machine  # noqa: E402

from tierloom.stages.directory.shared.announcer import Announcer  # noqa: E402
from tierloom.stages.directory.shared.contract import Directory  # noqa: E402
from tierloom.stages.directory.shared.embedded import EmbeddedDirectory  # noqa: E402
from tierloom.stages.directory.shared.named import named_directory  # noqa: E402
from tierloom.stages.directory.shared.records import WorkerRecord, number_of, pack_changes  # noqa: E402
from tierloom.stages.directory.shared.redis_directory import RedisDirectory  # noqa: E402
from tierloom.stages.tiers.redis.resp import command  # noqa: E402
from tierloom.stages.tiers.redis.tier import RedisOptions  # noqa: E402

PROMPT, BATCH, FINDS = 64, 512, 10_000
STORE = {"hot": {"use": "memory", "capacity": "1 MiB"}}


def prompt(n: int) -> list[bytes]:
    """Names of the chunks of prompt `n`: random bytes are as good as digests."""
    raw = random.Random(n).randbytes(16 * PROMPT)
    return [raw[i : i + 16] for i in range(0, len(raw), 16)]


def worker(name: str, heartbeat: float = 600.0) -> WorkerRecord:
    process = random.Random(name).randbytes(16).hex()
    return WorkerRecord(instance=name, process=process, tiers=("hot",), heartbeat=heartbeat)


async def fill(directory: Directory, chunks: int, epoch: int) -> None:
    prompts = range(chunks // PROMPT)
    per = BATCH // PROMPT
    for sequence, at in enumerate(range(0, len(prompts), per), 1):
        names = [name for n in prompts[at : at + per] for name in prompt(n)]
        assert await directory.announce(epoch, sequence, pack_changes((n, 1) for n in names))


async def opened(port: int) -> RedisDirectory:
    options = RedisOptions(url=f"redis://127.0.0.1:{port}", stall=10.0)
    return RedisDirectory(options, timeout=30.0)


def info(port: int, section: str, field: str) -> int:
    text = servers.ask(port, "INFO", section)
    return int(text.partition(f"{field}:")[2].split()[0])


def told(name: str, **figures: float) -> None:
    print(f"{name:44}" + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)


async def searched(directory: Directory, chunks: int, finds: int, seed: int) -> list[float]:
    """Seconds of each search for 64 chunks that are all there, sorted."""
    rng, took = random.Random(seed), []
    asked = [prompt(rng.randrange(chunks // PROMPT)) for _ in range(min(finds, 1000))]
    for i in range(finds):
        began = time.perf_counter()
        found = await directory.find(asked[i % len(asked)])
        took.append(time.perf_counter() - began)
        assert len(found) == PROMPT
    return sorted(took)


def client(url: str, chunks: int, finds: int, seed: int) -> list[float]:
    async def go() -> list[float]:
        directory = named_directory(url, timeout=30.0)
        took = await searched(directory, chunks, finds, seed)
        await directory.close()
        return took

    return asyncio.run(go())


async def embedded(chunks: int) -> None:
    directory = EmbeddedDirectory()
    epoch = await directory.join(worker("a"))
    prompts = [pack_changes((n, 1) for n in prompt(i)) for i in range(chunks // PROMPT)]
    assert await directory.announce(epoch, 1, prompts[0])  # compiled by then
    gc.collect()
    before, cpu = resident(), time.process_time()
    for sequence, some in enumerate(prompts[1:], 2):
        assert await directory.announce(epoch, sequence, some)
    cpu, grown = time.process_time() - cpu, resident() - before
    took = await searched(directory, chunks, FINDS, 1)
    told("embedded: find 64 [20 us]", p50_us=1e6 * median(took), p99_us=1e6 * tail(took))
    told("embedded: announce", us_a_chunk=1e6 * cpu / chunks, bytes_a_chunk=grown / chunks)


async def hosted(chunks: int) -> None:
    """The same in a `tierloom serve`, asked over its socket."""
    with (
        TemporaryDirectory() as folder,
        store_server.process(Path(folder), "--directory", "embedded", tiers=STORE) as server,
    ):
        url = server.url.replace("tierloom", "directory")
        directory = named_directory(url, timeout=30.0)
        epoch = await directory.join(worker("a"))
        cpu = cpu_of(server.pid)
        await fill(directory, chunks, epoch)
        told("hosted: announce", server_us_a_chunk=1e6 * (cpu_of(server.pid) - cpu) / chunks)
        cpu, mine = cpu_of(server.pid), time.process_time()
        took = await searched(directory, chunks, FINDS, 1)
        told(
            "hosted: find 64, one client [0.2 ms]",
            p50_ms=1e3 * median(took), p99_ms=1e3 * tail(took),
            server_ms=1e3 * (cpu_of(server.pid) - cpu) / FINDS,
            client_ms=1e3 * (time.process_time() - mine) / FINDS,
        )  # fmt: skip
        cpu = cpu_of(server.pid)
        with get_context("spawn").Pool(8) as pool:
            parts = pool.starmap(client, [(url, chunks, FINDS // 8, n) for n in range(8)])
        took = sorted(t for part in parts for t in part)
        told(
            "hosted: find 64, 8 clients, each in a process",
            p50_ms=1e3 * median(took), p99_ms=1e3 * tail(took),
            server_ms=1e3 * (cpu_of(server.pid) - cpu) / len(took),
        )  # fmt: skip
        await directory.close()


def median(took: list[float]) -> float:
    return took[len(took) // 2]


def tail(took: list[float]) -> float:
    return took[-len(took) // 100 - 1]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def find(server: Any, chunks: int) -> None:
    directory = await opened(server.port)
    empty = info(server.port, "memory", "used_memory")
    epoch = await directory.join(worker("a"))
    cpu, began = cpu_of(server.pid), time.perf_counter()
    await fill(directory, chunks, epoch)
    wall, cpu = time.perf_counter() - began, cpu_of(server.pid) - cpu
    told(
        "announce [300,000 chunks/s of one core]",
        server_us_a_chunk=1e6 * cpu / chunks, chunks_a_cpu_second=chunks / cpu,
        wall_chunks_a_second=chunks / wall,
    )  # fmt: skip
    used = info(server.port, "memory", "used_memory") - empty
    told("memory, one holder [112 B]", bytes_a_chunk=used / chunks)
    cpu, mine = cpu_of(server.pid), time.process_time()
    took = await searched(directory, chunks, FINDS, 1)
    told(
        "find 64, one client [0.25, 1.5, 0.10 ms]",
        p50_ms=1e3 * median(took), p99_ms=1e3 * tail(took),
        server_ms=1e3 * (cpu_of(server.pid) - cpu) / FINDS,
        client_ms=1e3 * (time.process_time() - mine) / FINDS,
    )  # fmt: skip
    keys = [[b"tierloom" + n[:16] for n in prompt(i)] for i in range(0, chunks // PROMPT, 16)]
    asked = [command("MGET", *some) for some in keys[:1000]]
    (node,) = directory._nodes.servers.nodes
    cpu = cpu_of(server.pid)
    for each in asked:
        assert None not in await node.ask([each])
    told("bare MGET of as many", server_ms=1e3 * (cpu_of(server.pid) - cpu) / len(asked))
    cpu = cpu_of(server.pid)
    with get_context("spawn").Pool(8) as pool:
        url = f"redis://127.0.0.1:{server.port}"
        parts = pool.starmap(client, [(url, chunks, FINDS // 8, n) for n in range(8)])
    took = sorted(t for part in parts for t in part)
    told(
        "find 64, 8 clients, each in a process",
        p50_ms=1e3 * median(took), p99_ms=1e3 * tail(took),
        server_ms=1e3 * (cpu_of(server.pid) - cpu) / len(took),
    )  # fmt: skip
    await directory.close()


async def stale(server: Any, chunks: int) -> None:
    """All that there is, is a dead worker's; a living one has one prompt more. Swept by and by."""
    directory = await opened(server.port)
    alive = await directory.join(worker("b"))
    mine = [b"%016d" % i for i in range(PROMPT)]
    assert await directory.announce(alive, 1, pack_changes((n, 1) for n in mine))
    (dead,) = set(await directory.workers()) - {number_of(alive)}
    servers.ask(server.port, "DEL", f"tierloom!h{dead}")
    assert await directory.find(prompt(0)) == []
    assert len(await directory.find(mine)) == PROMPT
    cpu, swept = cpu_of(server.pid), 0
    for _ in range(200):
        swept += await directory.sweep(2000)
        servers.ask(server.port, "DEL", "tierloom!l")  # whoever is next need not wait for a second
    told(
        "stale entries", of=chunks, swept=swept, server_us=1e6 * (cpu_of(server.pid) - cpu) / swept
    )
    await directory.close()


def load(port: int, part: int, seconds: float) -> tuple[int, int, int, float, list[float]]:
    """A quarter of the load, from a process: beats, finds, chunks, seconds of CPU, and of finds."""
    return asyncio.run(loaded(port, part, seconds))


async def loaded(port: int, part: int, seconds: float) -> tuple[int, int, int, float, list[float]]:
    clients = [await opened(port) for _ in range(8)]
    names = [f"w{part}/{i}" for i in range(250)]
    epochs = [await clients[i % 8].join(worker(name, 30.0)) for i, name in enumerate(names)]
    sequences = [0] * len(epochs)
    shared = [prompt(n) for n in range(part * 50, part * 50 + 50)]
    took, counts = list[float](), [0, 0, 0]

    async def tell(i: int, names: list[bytes]) -> None:
        sequences[i] += 1
        changes = pack_changes((name, 1) for name in names)
        assert await clients[i % 8].announce(epochs[i], sequences[i], changes)

    async def beat(n: int) -> None:
        i = n % len(epochs)
        if busy.isdisjoint({i}):
            assert await clients[i % 8].beat(epochs[i], sequences[i])
            counts[0] += 1

    async def find(n: int) -> None:
        began = time.perf_counter()
        assert len(await clients[n % 8].find(shared[n % len(shared)])) == PROMPT
        took.append(time.perf_counter() - began)
        counts[1] += 1

    async def announce(n: int) -> None:
        i = n % len(epochs)
        if busy.isdisjoint({i}):
            busy.add(i)
            await tell(i, prompt(1000 + 1_000_000 * part + n))
            busy.remove(i)
            counts[2] += PROMPT

    async def paced(rate: float, act: Any, first: int, step: int) -> None:
        due = time.perf_counter()
        end = due + seconds
        n = first
        while due < end:
            due += step / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if time.perf_counter() > end:
                return
            await act(n)
            n += step

    busy = set[int]()
    for n, some in enumerate(shared):
        await tell(n, some)
    jobs = [paced(250, beat, n, 4) for n in range(4)]
    jobs += [paced(1250, find, n, 32) for n in range(32)]
    jobs += [paced(50_000 / PROMPT / 4, announce, n, 8) for n in range(8)]
    cpu = time.process_time()
    await asyncio.gather(*jobs)
    cpu = time.process_time() - cpu
    for each in clients:
        await each.close()
    return *counts, cpu, took  # type: ignore[return-value]


def many(server: Any, seconds: float) -> None:
    """1,000 workers' heartbeats, 5,000 finds and 50,000 announcements a second, of 4 processes."""
    servers.ask(server.port, "FLUSHALL")
    with get_context("spawn").Pool(4) as pool:
        pool.starmap(load, [(server.port, part, 0.1) for part in range(4)])  # all is imported
        cpu = cpu_of(server.pid)
        parts = pool.starmap(load, [(server.port, part, seconds) for part in range(4)])
    spent = cpu_of(server.pid) - cpu
    beats, finds, chunks, cpu = (sum(part[i] for part in parts) for i in range(4))
    took = sorted(t for part in parts for t in part[4])
    told(
        "1,000 workers [70 % at 5000 finds/s, 5 ms]", server_core_percent=100 * spent / seconds,
        p99_ms=1e3 * tail(took), p50_ms=1e3 * median(took), finds_s=finds / seconds,
        chunks_s=chunks / seconds, beats_s=beats / seconds, clients_percent=100 * cpu / seconds,
    )  # fmt: skip


async def refill(server: Any, chunks: int) -> None:
    """One worker has them all, and the server comes back empty."""
    servers.ask(server.port, "FLUSHALL")
    directory = await opened(server.port)
    announcer = Announcer(directory, worker("a", 2.0))
    names = [name for n in range(chunks // PROMPT) for name in prompt(n)]
    cpu = time.process_time()
    for name in names:
        announcer.note(name, 0, True)
    told("note", us_a_chunk=1e6 * (time.process_time() - cpu) / len(names))
    task = asyncio.create_task(announcer.run())

    async def full() -> float:
        began = time.perf_counter()
        while await count(server) < len(names):  # noqa: ASYNC110 (the server tells nobody)
            await asyncio.sleep(0.25)
        return time.perf_counter() - began

    await full()
    servers.ask(server.port, "FLUSHALL")
    cpu = time.process_time()
    wall = await full()
    told(
        "lost and full again [10 s, 5 % of a core]", seconds=wall * 1e6 / len(names),
        engine_core_percent=100 * (time.process_time() - cpu) / wall,
        engine_cpu_s=(time.process_time() - cpu) * 1e6 / len(names),
    )  # fmt: skip
    task.cancel()
    await directory.close()


async def count(server: Any) -> int:
    return int(servers.ask(server.port, "DBSIZE")[1:])


async def stale_finds(seconds: float) -> None:
    """Three engines that put and evict, 1,000 times a second, 1 in 20 of them an eviction."""
    directory, rng = EmbeddedDirectory.warm(), random.Random(1)
    names = [name for n in range(62) for name in prompt(n)]
    announcers = [Announcer(directory, worker(f"i{i}", 2.0)) for i in range(3)]
    tasks = [asyncio.create_task(a.run()) for a in announcers]
    held, finds, bad, holders_named, stale = [set[bytes]() for _ in range(3)], 0, 0, 0, 0
    for i in range(3):
        for name in names:
            held[i].add(name)
            announcers[i].note(name, 0, True)
    await asyncio.sleep(1)

    async def change() -> None:
        began, made = time.perf_counter(), 0
        while True:
            await asyncio.sleep(0.001)
            for _ in range(int(1000 * (time.perf_counter() - began)) - made):
                i, name, kept = rng.randrange(3), rng.choice(names), rng.random() > 0.054
                (held[i].add if kept else held[i].discard)(name)
                announcers[i].note(name, 0, kept)
                made += 1

    tasks.append(asyncio.create_task(change()))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        await asyncio.sleep(0.004 * rng.random())
        at = PROMPT * rng.randrange(62)
        asked = names[at : at + PROMPT]
        who = {number_of(a.epoch): i for i, a in enumerate(announcers)}
        found = await directory.find(asked)
        named = [(n, who[h.number]) for n, hs in zip(asked, found, strict=False) for h in hs]
        wrong = sum(name not in held[i] for name, i in named)
        finds, bad = finds + 1, bad + (wrong > 0)
        holders_named, stale = holders_named + len(named), stale + wrong
    told(
        "stale finds [0.1 %]", finds=finds, stale_percent=100 * bad / finds,
        stale_holders_percent=100 * stale / holders_named, holders_a_find=holders_named / finds,
    )  # fmt: skip
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("embedded", "hosted", "stale_finds", "find", "stale", "many", "refill")
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", nargs="*", default=parts, choices=parts)
    parser.add_argument("--valkey", action="store_true")
    given = parser.parse_args()
    print(machine())
    if "embedded" in given.only:
        asyncio.run(embedded(given.chunks))
    if "hosted" in given.only:
        asyncio.run(hosted(given.chunks))
    if "stale_finds" in given.only:
        asyncio.run(stale_finds(4 * given.seconds))
    program = servers.valkey_program() if given.valkey else servers.redis_program()
    with servers.redis(program_=program) as server:
        if "find" in given.only:
            asyncio.run(find(server, given.chunks))
            if "stale" in given.only:
                asyncio.run(stale(server, given.chunks))
        if "many" in given.only:
            many(server, given.seconds)
        if "refill" in given.only:
            asyncio.run(refill(server, given.chunks))
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")


if __name__ == "__main__":
    main()
