"""A remote tier on this machine: CPU time of client and server per GB, and the time of a lookup.

    python benchmarks/remote.py redis [--tokens 4096] [--rounds 7]

Through the public API, with Llama-3.1-8B's shapes: objects of 32 MiB, checksummed when stored and
verified when retrieved, into a server that is full and evicts as much as comes. A figure counts
when every receipt is whole and the bytes that come back are those that were stored. `server` is
what the server's processes spend meanwhile, in ticks of 10 ms.

To add a tier: a function in CASES that starts its server and yields (options, process ids).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]
sys.path += [str(Path(__file__).parent), str(ROOT / "tests" / "tiers")]

from cases import CHUNK, SHAPES, Engine, clear, opened  # noqa: E402
from servers import redis as redis_server  # noqa: E402
from servers import valkey_program  # noqa: E402
from yardstick import GB, Memcpy, idle, timed  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tierloom import Pipeline

KEPT = 4
"""Prompts that fit into the server."""
REST = 1.2
"""Seconds between stores: Redis tells old from new by a clock of seconds, and would otherwise evict
pieces of what is being stored."""
LOOKUP = 64
"""Chunks of a lookup."""
BARS = {"store": 0.70, "retrieve": 0.65, "lookup": 1.5}
"""At most: CPU s/GB of client and server, checksums included; ms, median."""


class Case(NamedTuple):
    """A tier whose server runs."""

    options: dict[str, Any]
    pids: list[int]


@contextmanager
def redis(nbytes: int, program: str = "", url: str = "redis://127.0.0.1:{}/0") -> Iterator[Case]:
    limit = str(KEPT * nbytes)
    full = ["--maxmemory", limit, "--maxmemory-policy", "allkeys-lru", "--maxmemory-samples", "10"]
    with redis_server(*full, program_=program) as server:
        yield Case({"use": "redis", "url": url.format(server.port)}, [server.pid])


@contextmanager
def valkey(nbytes: int) -> Iterator[Case]:
    with redis(nbytes, valkey_program()) as case:
        yield case


CASES = {"redis": redis, "valkey": valkey}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tier", choices=CASES)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    engine = Engine(SHAPES["8B"], arguments.tokens)
    with (
        CASES[arguments.tier](engine.shape.objects(arguments.tokens)) as case,
        opened(engine, {"cold": case.options}) as pipe,
    ):
        print(f"{arguments.tier}: {arguments.tokens} tokens, {engine.nbytes} bytes")
        measure(engine, pipe, case.pids, arguments.rounds)
        lookup(pipe)


def measure(engine: Engine, pipe: Pipeline, pids: list[int], rounds: int) -> None:
    memcpy, whole = Memcpy(), engine.tokens // CHUNK

    def store(tokens: Any) -> None:
        receipt = pipe.store(tokens, engine.caches, engine.source).wait()
        assert (receipt.tokens, receipt.lost) == (engine.tokens, {}), receipt
        assert receipt.tiers == {"cold": whole}, receipt

    def retrieve(tokens: Any) -> None:
        receipt = pipe.retrieve(tokens, engine.caches, engine.target).wait()
        assert (receipt.tokens, receipt.lost) == (engine.tokens, {}), receipt

    for _ in range(KEPT + 1):  # pages and processes are warm, the server is full
        time.sleep(REST)
        last = engine.prompt()
        store(last)
        engine.blank()
        retrieve(last)
        assert engine.same(), "the bytes that came back are not those that were stored"
    idle()
    prompts = [engine.prompt() for _ in range(rounds)]
    report("store", store, prompts, engine.nbytes, pids, memcpy)
    clear(pipe, "cold")  # of a full server's objects the eviction may have torn some
    store(last)
    idle()
    report("retrieve", retrieve, [last] * rounds, engine.nbytes, pids, memcpy)
    assert engine.same(), "the bytes that came back are not those that were stored"


def report(
    what: str, run: Callable[[Any], None], prompts: list[Any], nbytes: int, pids: list[int],
    memcpy: Memcpy,
) -> None:  # fmt: skip
    """Run for each prompt, and print medians of wall time and means of CPU time."""
    size, took, copies, before = nbytes / GB, [], [], cpu_of(pids)
    for prompt in prompts:
        time.sleep(REST)
        copies.append(timed(lambda: memcpy(nbytes)))
        took.append(timed(lambda p=prompt: run(p)))  # type: ignore[misc]
    server = (cpu_of(pids) - before) / len(prompts) / size
    client = statistics.mean(t.cpu for t in took) / size
    wall = statistics.median(t.wall for t in took)
    copy = statistics.median(t.wall for t in copies)
    print(
        f"{what:9}{size / wall:6.2f} GB/s   CPU s/GB: client {client:.3f} + server {server:.3f} = "
        f"{client + server:.3f} (bar {BARS[what]:.2f})   memcpy {size / copy:.1f} GB/s"
    )


def lookup(pipe: Pipeline, rounds: int = 200) -> None:
    """None of the keys is there; the server looks for all of them all the same."""
    tier = pipe.tiers["cold"]
    keys = [os.urandom(32) for _ in range(LOOKUP)]

    async def ask() -> list[float]:
        spent = []
        for _ in range(rounds):
            begun = time.perf_counter()
            await tier.has(keys)
            spent.append(1e3 * (time.perf_counter() - begun))
        return sorted(spent)

    spent = pipe._portal.call(ask)
    p50, p95 = spent[rounds // 2], spent[rounds * 95 // 100]
    print(
        f"lookup of {LOOKUP} chunks: p50 {p50:.2f} ms (bar {BARS['lookup']}), p95 {p95:.2f} ms, "
        f"best {spent[0]:.2f} ms"
    )


def cpu_of(pids: list[int]) -> float:
    """Seconds of CPU that processes and their children have spent."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            inner = [int(child) for child in children.read_text().split()]
            ticks += round(cpu_of(inner) * os.sysconf("SC_CLK_TCK"))
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
