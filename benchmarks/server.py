"""`tierloom serve` over TCP, a unix socket and shared memory: store, retrieve, lookup, and faults.

    make bench-server                   # 2 minutes; writes bench-server.json

Llama-3.1-8B shapes, 2,048 tokens: 8 objects of 32 MiB. CPU seconds are those of client and server
together, checksums included; beside them stands the same out of the client's own memory, and a
memcpy, in the same run. A figure whose bytes do not come back as they were stored is refused. After
faults: how long requests then take, and when the first is found again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests" / "tiers")]

import numpy as np  # noqa: E402
import store_server  # noqa: E402
from cases import CHUNK, SHAPES, Engine, opened  # noqa: E402
from yardstick import Memcpy, idle, machine, timed  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierloom import Pipeline

TOKENS, ROUNDS, KEPT = 2048, 12, 5
LOOKUPS, CHUNKS = 300, 64
WAYS = ("memory", "tcp", "unix", "shared")
BARS = {("retrieve", "tcp"): 0.65, ("retrieve", "shared"): 0.20}
LOOKUP_BAR = 1.5e-3
DEADLINE = 0.8
OUT = ROOT / "bench-server.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", metavar="NAME", help="also write results/NAME.md")
    arguments = parser.parse_args()
    lines: list[str] = []
    figures: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        figures["copies"] = copies(Path(folder), lines)
        figures["faults"] = faults(Path(folder), lines)
    figures["load_after"] = round(os.getloadavg()[0], 2)
    OUT.write_text(json.dumps(figures, indent=1) + "\n")
    text = report(figures, lines)
    print(text)
    if arguments.write:
        (ROOT / "benchmarks" / "results" / f"{arguments.write}.md").write_text(text)


def report(figures: dict[str, Any], lines: list[str]) -> str:
    m = figures["machine"]
    head = (
        f"# A store of many engines\n\n{m['cpu']}, {m['cores']} cores, Linux {m['kernel']}, Python "
        f"{m['python']}; load {m['load']} before, {figures['load_after']} after. "
        "What each means: `benchmarks/server.py`.\n"
    )
    return "\n".join([head, *lines, ""])


def cpu_of(pid: int) -> float:
    """CPU seconds of a process, to the microsecond."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def tiers(way: str, server: store_server.Process) -> dict[str, Any]:
    if way == "memory":
        return {"hot": {"use": "memory", "capacity": "1 GiB"}}
    url = server.urls[way != "tcp"]
    return {"cold": {"use": "server", "url": url, "share": way == "shared"}}


def copies(folder: Path, lines: list[str]) -> dict[str, Any]:
    """Stores of what is new, retrieves of what is there, lookups; the median of rounds."""
    engine, memcpy = Engine(SHAPES["8B"], TOKENS), Memcpy()
    size = engine.nbytes / 1e9
    capacity = KEPT * SHAPES["8B"].objects(TOKENS)
    kept = {"hot": {"use": "memory", "capacity": capacity}}
    found: dict[str, Any] = {}
    with ExitStack() as home:
        server = home.enter_context(
            store_server.process(
                folder, tiers=kept, arena="512 MiB",
                listen=("tcp://127.0.0.1:0", f"unix://{folder}/socket"),
            )
        )  # fmt: skip
        lines += ["| | GB/s | CPU s/GB | of it the server's | bar |", "|---|---|---|---|---|"]
        for way in WAYS:
            with opened(engine, tiers(way, server)) as pipe:
                for what, (cpu, own, wall) in rounds(pipe, engine, server, memcpy).items():
                    bar = BARS.get((what, way))
                    verdict = (
                        "" if bar is None else f"<= {bar:g}: {'met' if cpu <= bar else 'MISSED'}"
                    )
                    lines.append(
                        f"| {what}, {way} | {size / wall:.2f} | {cpu:.3f} | {own:.3f} | {verdict} |"
                    )
                    found[f"{what} {way}"] = {"cpu_s_per_gb": cpu, "server": own, "wall": wall}
                if way != "memory":
                    found[f"lookup {way}"] = lookups(pipe, engine)
        copy = statistics.median(timed(partial(memcpy, engine.nbytes)).cpu for _ in range(5))
    raw = sockets(engine.nbytes)
    found |= {"memcpy": copy / size, "sockets": raw / size}
    lines += [
        f"| memcpy of as many bytes | | {copy / size:.3f} | | |",
        f"| as many bytes from socket to socket, TCP | | {raw / size:.3f} | | |",
        "",
        f"| {CHUNKS} keys, one round trip | p50 | p99 | whole lookup, tokens hashed, p50 | bar |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS[1:]:
        p50, p99, whole = (f"{1e3 * t:.2f} ms" for t in found[f"lookup {way}"])
        verdict = "met" if found[f"lookup {way}"][0] <= LOOKUP_BAR else "MISSED"
        lines.append(f"| {way} | {p50} | {p99} | {whole} | <= 1.5 ms: {verdict} |")
    return found


def sockets(nbytes: int) -> float:
    """CPU seconds of both ends, median of rounds, for bytes between two processes and no more."""
    into = memoryview(bytearray(nbytes))
    took = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = SENDER.format(port=listener.getsockname()[1], nbytes=nbytes)
        sender = subprocess.Popen([sys.executable, "-c", code])
        sock, _ = listener.accept()
        with sock:
            for _ in range(ROUNDS):
                before = cpu_of(sender.pid) + time.process_time()
                sock.sendall(b"g")
                at = 0
                while at < nbytes:
                    at += sock.recv_into(into[at : at + (1 << 20)])
                time.sleep(0.05)
                took.append(cpu_of(sender.pid) + time.process_time() - before)
        sender.wait(20)
    return statistics.median(took)


SENDER = """
import os, socket
data = bytearray(os.urandom(4096) * ({nbytes} // 4096))
with socket.create_connection(("127.0.0.1", {port})) as sock:
    while sock.recv(1):
        sock.sendall(data)
"""


def rounds(
    pipe: Pipeline, engine: Engine, server: store_server.Process, memcpy: Memcpy
) -> dict[str, tuple[float, float, float]]:
    """Per GB: CPU seconds of both, CPU seconds of the server; and seconds by the clock."""
    made = {}
    for _ in range(KEPT + 1):  # every page is touched, and evicts what was there
        last = engine.prompt()
        pipe.store(last, engine.caches, engine.source).wait()
    engine.blank()
    assert pipe.retrieve(last, engine.caches, engine.target).wait().tokens == TOKENS
    assert engine.same(), "the bytes that came back are not those that were stored"
    idle()
    for what in ("store", "retrieve"):
        took = []
        for _ in range(ROUNDS):
            memcpy(engine.nbytes)
            tokens = engine.prompt() if what == "store" else last
            ask, at = (pipe.store, engine.source) if what == "store" else (
                pipe.retrieve, engine.target
            )  # fmt: skip
            before = cpu_of(server.pid)
            one = timed(lambda: got.append(ask(tokens, engine.caches, at).wait()))  # noqa: B023
            time.sleep(0.05)  # what the server still does behind it counts, too
            own = cpu_of(server.pid) - before
            took.append((one.cpu + own, own, one.wall))
            receipt = got.pop()
            assert (receipt.tokens, receipt.lost) == (TOKENS, {}), receipt
            last = tokens
        size = engine.nbytes / 1e9
        cpu, own, wall = (statistics.median(column) for column in zip(*took, strict=True))
        made[what] = (cpu / size, own / size, wall)
    return made


got: list[Any] = []


def lookups(pipe: Pipeline, engine: Engine) -> tuple[float, float, float]:
    """Seconds in which the tier answers for 64 keys, p50 and p99, asked from another thread; and
    p50 of a whole lookup, whose 16,384 tokens are hashed first."""
    took, whole = [], []
    ask, has = pipe._portal.call, pipe.tiers["cold"].has
    for seed in range(LOOKUPS):
        make = np.random.default_rng(seed)
        keys = [make.bytes(32) for _ in range(CHUNKS)]
        took.append(timed(partial(ask, has, keys)).wall)
        tokens = make.integers(0, 50_000, CHUNKS * CHUNK).astype(np.int32)
        future = partial(pipe.begin_lookup, tokens)
        whole.append(timed(lambda future=future: future().result(10)).wall)
    took.sort()
    return took[len(took) // 2], took[int(len(took) * 0.99)], statistics.median(whole)


def faults(folder: Path, lines: list[str]) -> dict[str, Any]:
    """A server that is stopped, and one that is killed, under a pipeline of the preset's limits."""
    engine = Engine(SHAPES["SmolLM2"], TOKENS)
    cold = {"use": "server", "timeout": "400 ms", "fails": 2, "probe": "1 s"}
    found: dict[str, Any] = {}
    lines += [
        "", "| fault | first request | beyond its deadline | the next ten, longest | back after |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for way in ("tcp", "shared"):
        for fault in ("hangs", "dies"):
            home = folder / f"{way}-{fault}"
            listen = ("tcp://127.0.0.1:0",) if way == "tcp" else (f"unix://{home}/socket",)
            with store_server.process(home, listen=listen, tiers={
                "hot": {"use": "memory", "capacity": "512 MiB"}}) as server:  # fmt: skip
                url, again = server.url, server.listens[0]
                source = preset(cold | {"url": url})
                with pipeline(source, engine) as pipe:
                    tokens = engine.prompt()
                    assert pipe.store(tokens, engine.caches, engine.source).wait().lost == {}
                    found[f"{way} {fault}"] = one = fail(
                        pipe, engine, tokens, server, fault, partial(
                            store_server.Process, home, listen=(again,), tiers={
                                "hot": {"use": "memory", "capacity": "512 MiB"}})
                    )  # fmt: skip
            late = max(0.0, one["first"] - DEADLINE)
            lines.append(
                f"| {fault}, {way} | {one['first'] * 1e3:.0f} ms | {late * 1e3:.0f} ms (bar 50) | "
                f"{one['next'] * 1e3:.0f} ms | {one['back']:.2f} s (bar 2) |"
            )
    return found


def preset(cold: dict[str, Any]) -> dict[str, Any]:
    from cases import write_through

    source = write_through({"cold": cold})
    source["tiers"]["cold"] = cold
    source["graphs"]["retrieve"]["deadline"] = DEADLINE
    return source


def pipeline(source: dict[str, Any], engine: Engine) -> Pipeline:
    import tierloom

    return tierloom.open(source, layout=engine.layout, model="bench")


def fail(
    pipe: Pipeline, engine: Engine, tokens: Any, server: store_server.Process, fault: str,
    restart: Callable[[], store_server.Process],
) -> dict[str, float]:  # fmt: skip
    def ask() -> tuple[float, int]:
        begun = time.perf_counter()
        got = pipe.retrieve(tokens, engine.caches, engine.target).wait()
        return time.perf_counter() - begun, got.tokens

    assert ask()[1] == TOKENS
    server.child.send_signal(signal.SIGSTOP) if fault == "hangs" else server.kill()
    first, nothing = ask()
    assert not nothing
    ask()  # the second failure opens the breaker
    rest = max(ask()[0] for _ in range(10))
    if fault == "hangs":
        server.child.send_signal(signal.SIGCONT)
        begun = time.perf_counter()
        while ask()[1] < TOKENS:
            time.sleep(0.01)
        return {"first": first, "next": rest, "back": time.perf_counter() - begun}
    fresh = restart()
    try:
        begun = time.perf_counter()
        while pipe.store(tokens, engine.caches, engine.source).wait().lost:
            time.sleep(0.01)
        assert ask()[1] == TOKENS
        return {"first": first, "next": rest, "back": time.perf_counter() - begun}
    finally:
        fresh.kill()


if __name__ == "__main__":
    main()
