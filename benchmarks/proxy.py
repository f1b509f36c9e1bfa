"""`tierloom proxy` beside vLLM's toy proxy, over stub engines in a process of their own:

    python benchmarks/proxy.py [--python .venv-vllm/bin/python] [--json FILE] [--rounds N]

- 50 requests/s: time from request to answer, beside the same requests sent to both engines without
  a proxy. Prompts of 4 kB, nobody has had them.
- CPU of the proxy's process for a request, and for a token of a stream, in turns with the toy proxy
  in the same environment.
- 1,000 streams at once: the proxy's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STUBS = ROOT / "tests" / "adapters" / "proxy"
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]
sys.path[:0] = [str(ROOT / "benchmarks"), str(STUBS)]

from third_party import VLLM, third_party_proxies  # noqa: E402
from yardstick import cpu_of, machine  # noqa: E402

TEXT = "lorem ipsum " * 340
RATE = 50


class Line:
    """A kept connection that reads no more of an answer than its framing."""

    async def open(self, port: int) -> Line:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        return self

    async def ask(self, body: dict[str, Any]) -> tuple[bytes, int]:
        """The body of an answer; of a stream, how many pieces it had."""
        raw = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        said = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        assert b" 200 " in said, said
        if b"content-length:" in said:
            length = int(said.split(b"content-length:")[1].split(b"\r\n")[0])
            return await self.reader.readexactly(length), 1
        body_, pieces = b"", 0
        while size := int(await self.reader.readline(), 16):
            body_ += (await self.reader.readexactly(size + 2))[:-2]
            pieces += 1
        await self.reader.readexactly(2)
        return body_, pieces


def body(name: str, **more: Any) -> dict[str, Any]:
    return {"model": "stub", "prompt": f"{name} {random.random()} {TEXT}", "max_tokens": 1, **more}


@contextlib.contextmanager
def stubs(python: str, pace: float) -> Iterator[list[int]]:
    command = [python, str(STUBS / "stub_engine.py"), "4", str(pace)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield [int(port) for port in child.stdout.readline().split()]
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def proxy(kind: str, python: str, engines: list[int]) -> Iterator[tuple[int, int]]:
    """Port and process id. `kind`: toy, or a way of ours."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if kind == "toy":
        command = [python, str(third_party_proxies()["toy"]), "--port", str(port)]
        for flag, ports in (("prefiller", engines[:2]), ("decoder", engines[2:])):
            command += [f"--{flag}-hosts", *["127.0.0.1"] * 2]
            command += [f"--{flag}-ports", *map(str, ports)]
    else:
        command = [python, "-m", "tierloom.adapters.cli", "proxy", "--port", str(port)]
        command += ["--way", kind]
        for i, engine in enumerate(engines):
            command += ["--prefill" if i < 2 else "--decode", f"http://127.0.0.1:{engine}"]
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    try:
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            assert child.poll() is None, command
            time.sleep(0.1)
        yield port, child.pid
    finally:
        child.kill()
        child.wait()


async def paced(ports: list[int], seconds: float) -> list[float]:
    """Seconds of each request, of RATE a second; to several ports one after another, as a proxy
    asks a prefiller and a decoder."""
    took: list[float] = []
    idle: list[list[Line]] = []

    async def one(name: str) -> None:
        lines = idle.pop() if idle else [await Line().open(port) for port in ports]
        said = body(name)
        begun = time.perf_counter()
        for line in lines:
            await line.ask(said)
        took.append(time.perf_counter() - begun)
        idle.append(lines)

    begun, tasks = time.perf_counter(), []
    for i in range(int(seconds * RATE)):
        await asyncio.sleep(max(0.0, begun + i / RATE - time.perf_counter()))
        tasks.append(asyncio.create_task(one(f"{i}")))
    await asyncio.gather(*tasks)
    return took[RATE:]


def quantiles(took: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(took, n=100)
    return {"p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3}


def overhead(python: str, seconds: float, rounds: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {"direct": [], "after": [], "auto": []}
    with stubs(python, 0) as engines:
        for _ in range(rounds):
            found["direct"].append(quantiles(asyncio.run(paced([engines[0], engines[2]], seconds))))
            for way in ("after", "auto"):
                with proxy(way, python, engines) as (port, _):
                    found[way].append(quantiles(asyncio.run(paced([port], seconds))))
    figures = {
        name: {key: statistics.median(each[key] for each in rows) for key in rows[0]}
        for name, rows in found.items()
    }
    for way in ("after", "auto"):
        for key in ("p50_ms", "p99_ms"):
            gaps = [w[key] - d[key] for w, d in zip(found[way], found["direct"], strict=True)]
            figures[way][f"over_{key}"] = statistics.median(gaps)
            figures[way][f"over_{key}_each"] = sorted(gaps)
    return figures


async def workers(port: int, count: int, each: int, **more: Any) -> int:
    async def work(i: int) -> int:
        line = await Line().open(port)
        pieces = 0
        for j in range(each):
            pieces += (await line.ask(body(f"{i}-{j}", **more)))[1]
        line.writer.close()
        return pieces

    return sum(await asyncio.gather(*(work(i) for i in range(count))))


def cpu(kind: str, python: str) -> dict[str, float]:
    """CPU seconds of a proxy for a request and a streamed token."""
    with stubs(python, 0.01) as engines, proxy(kind, python, engines) as (port, pid):
        asyncio.run(workers(port, 4, 10))
        before = cpu_of(pid)
        asyncio.run(workers(port, 4, 150))
        request = (cpu_of(pid) - before) / 600
        before = cpu_of(pid)
        pieces = asyncio.run(workers(port, 32, 2, stream=True, max_tokens=300))
        token = (cpu_of(pid) - before - 64 * request) / pieces
    return {"request_ms": request * 1e3, "token_us": token * 1e6}


def memory(python: str, streams: int) -> dict[str, float]:
    """MB of a proxy: at start, and at most while so many streams run."""
    with stubs(python, 0.5) as engines, proxy("auto", python, engines) as (port, pid):
        asyncio.run(workers(port, 1, 2))
        before = status(pid, "VmRSS")
        pieces = asyncio.run(workers(port, streams, 1, stream=True, max_tokens=40))
        assert pieces == streams * 41, pieces
        return {"at_start": before, "most": status(pid, "VmHWM"), "streams": streams}


def status(pid: int, field: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(ln.split()[1]) * 1024 / 1e6 for ln in lines if ln.startswith(field))


def main() -> None:
    said = argparse.ArgumentParser(description=__doc__)
    said.add_argument("--python", default=str(ROOT / ".venv-vllm" / "bin" / "python"))
    said.add_argument("--json")
    said.add_argument("--rounds", type=int, default=5)
    said.add_argument("--seconds", type=float, default=12)
    said.add_argument("--streams", type=int, default=1000)
    args = said.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ["PYTHONPATH"] = str(ROOT / "src")
    os.environ.pop("OPENAI_API_KEY", None)
    figures: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[0]}
    figures["toy"] = f"vLLM {VLLM.version}"
    figures["at_50_a_second"] = overhead(args.python, args.seconds, args.rounds)
    rounds = [{k: cpu(k, args.python) for k in ("toy", "auto")} for _ in range(args.rounds)]
    for key in ("request_ms", "token_us"):
        each = {kind: statistics.median(r[kind][key] for r in rounds) for kind in ("toy", "auto")}
        ratios = sorted(r["auto"][key] / r["toy"][key] for r in rounds)
        figures[key] = {**each, "ratio": statistics.median(ratios), "ratios": ratios}
    figures["without_uvloop"] = cpu("auto", sys.executable)
    figures["memory_mb"] = memory(args.python, args.streams)
    figures["load_at_the_end"] = os.getloadavg()[0]
    text = json.dumps(figures, indent=2)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
