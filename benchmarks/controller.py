"""`tierloom control serve`: lookups over 10^6 chunks; start and memory beside a bare FastAPI app.

    python benchmarks/controller.py [--chunks 1000000] [--directory redis|hosted] [--json FILE]

Each figure stands beside the load of the machine while it was taken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from array import array
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "stages" / "tiers"))
BARE = """
import socket, sys, uvicorn
from fastapi import FastAPI
app = FastAPI()
@app.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "alive"}
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
config = uvicorn.Config(app, log_level="critical", loop="asyncio", http="h11")
uvicorn.Server(config).run([listener])
"""
ROUNDS = 7


def ask(url: str, body: Any = None) -> bytes:
    raw = json.dumps(body).encode() if body is not None else None
    asked = urllib.request.Request(url, raw, {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return bytes(answer.read())


def started(*command: str) -> tuple[subprocess.Popen[str], str, float]:
    """A server that says where it listens, and seconds until it answered."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    url = child.stdout.readline().split()[-1]
    while not answers(url + "/livez"):
        time.sleep(0.002)
    return child, url, time.perf_counter() - began


def answers(url: str) -> bool:
    try:
        return bool(ask(url))
    except OSError:
        return False


def resident(pid: int) -> float:
    """MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1000


def cpu_seconds(pid: int) -> float:
    """Of a process since its start: says more than the time on a machine that others use."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def stop(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGTERM)
    child.wait(20)


def starts(directory: str) -> dict[str, Any]:
    """Interleaved, so that what else the machine does meets both."""
    control = ("-m", "tierloom.adapters.cli", "control", "serve", "--port", "0", "--directory")
    found: dict[str, list[float]] = {
        f"{name}{what}": [] for name in ("bare", "control") for what in ("", " CPU", " MB")
    }
    for _ in range(ROUNDS):
        for name, command in (("bare", ("-c", BARE)), ("control", (*control, directory))):
            child, url, seconds = started(*command)
            found[f"{name} CPU"].append(cpu_seconds(child.pid))
            ask(url + ("/openapi.json" if name == "bare" else "/v1/openapi.json"))
            if name == "control":
                ask(url + "/v1/lookup", {"tokens": list(range(512))})
            found[name].append(seconds)
            found[f"{name} MB"].append(resident(child.pid))
            stop(child)
    return {name: statistics.median(some) for name, some in found.items()}


async def filled(directory: str, chunks: int) -> tuple[list[int], list[str]]:
    """Four workers that together tell of so many chunks, all of them alive for ten minutes; a
    prompt of 16,384 tokens that two of them have, and the keys of its chunks."""
    from tierloom.stages.directory.shared.described import described, seed_of
    from tierloom.stages.directory.shared.named import named_directory
    from tierloom.stages.directory.shared.records import WorkerRecord, chunk_name, pack_changes
    from tierloom.stages.kv.namespace import Namespace
    from tierloom.stages.kv.prefix import chunk_keys

    made = named_directory(directory, timeout=30)
    names = Namespace(model="m", geometry="dtype='bfloat16'", layers=(0, 32), heads=(0, 8))
    records = [
        WorkerRecord(
            instance=f"engine-{i}", process=f"{i:032x}", model="m", tiers=("hot", "warm"),
            namespace=names.digest.hex(), fields=described(names, 131072), heartbeat=600,
        )
        for i in range(4)
    ]  # fmt: skip
    tokens = [(7 * i) % 50_000 for i in range(16384)]
    ids: Any = array("i", tokens)
    keys = chunk_keys(seed_of(records[0], tags={}) or b"", ids, 32, 256)
    for i, record in enumerate(records):
        epoch = await made.join(record)
        mine = [chunk_name(names.digest, key) for key in keys] if i < 2 else []
        mine += [sha256(b"%d %d" % (i, n)).digest()[:16] for n in range(chunks // 4 - len(mine))]
        for sequence, at in enumerate(range(0, len(mine), 1024), 1):
            part = pack_changes((name, 1) for name in mine[at : at + 1024])
            assert await made.announce(epoch, sequence, part)
    await made.close()
    return tokens, [key.hex() for key in keys]


def timed(url: str, body: Any, pid: int, times: int = 200) -> dict[str, float]:
    """ms, of a client whose connection is open; and the controller's own CPU."""
    import http.client

    host = http.client.HTTPConnection(url.removeprefix("http://"))
    raw, found, used = json.dumps(body).encode(), [], cpu_seconds(pid)
    for _ in range(times):
        began = time.perf_counter()
        host.request("POST", "/v1/lookup", raw, {"content-type": "application/json"})
        answer = host.getresponse().read()
        found.append(1e3 * (time.perf_counter() - began))
    hits = json.loads(answer)["instances"]
    assert [hit["tokens"] for hit in hits.values()] == [16384, 16384], hits
    found.sort()
    cpu = 1e3 * (cpu_seconds(pid) - used) / times
    return {"p50": found[times // 2], "p99": found[times * 99 // 100], "CPU": cpu}


def main() -> None:
    from servers import redis
    from store_server import process

    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--directory", choices=["redis", "hosted"], default="redis")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"bench-control-{os.getpid()}"
    figures: dict[str, Any] = {"load before": os.getloadavg()[0]}
    hosted = process(folder, "--directory", "embedded")
    with redis() if asked.directory == "redis" else hosted as server:
        if asked.directory == "redis":
            directory = f"redis://127.0.0.1:{server.port}/0"
        else:
            directory = server.url.replace("tierloom://", "directory://")
        began = time.perf_counter()
        tokens, keys = asyncio.run(filled(directory, asked.chunks))
        figures["seconds to fill"] = time.perf_counter() - began
        figures["start, s; memory, MB (medians)"] = starts(directory)
        command = ("-m", "tierloom.adapters.cli", "control", "serve", "--port", "0")
        child, url, _ = started(*command, "--directory", directory)
        try:
            timed(url, {"tokens": tokens}, child.pid, 20)
            figures["lookup of 16,384 tokens, ms"] = timed(url, {"tokens": tokens}, child.pid)
            figures["lookup of 64 keys, ms"] = timed(url, {"chunks": keys}, child.pid)
            figures["livez, ms"] = bare(url)
            figures["memory after, MB"] = resident(child.pid)
        finally:
            stop(child)
    figures["load after"] = os.getloadavg()[0]
    print(json.dumps(figures, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2))


def bare(url: str, times: int = 200) -> float:
    """What a request costs that asks nobody: the yardstick."""
    import http.client

    host, found = http.client.HTTPConnection(url.removeprefix("http://")), []
    for _ in range(times):
        began = time.perf_counter()
        host.request("GET", "/livez")
        host.getresponse().read()
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found)


if __name__ == "__main__":
    main()
