"""A proxy over engines, and a client; and a server that answers anything."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from stub_engine import InThread, StubEngine

from tierloom.adapters.proxy.http_app import ProxyRoutes
from tierloom.adapters.proxy.parts import ProxyParts

TEXT = "The Slow Survey began in 1936, and was slow. " * 120
"""Long enough for a prefiller."""


class Rig:
    """2 prefillers, 2 decoders, a proxy over them, and a client."""

    def __init__(self, stubs: list[StubEngine], parts: ProxyParts, threads: InThread) -> None:
        self.stubs, self.parts, self.threads = stubs, parts, threads
        self.prefillers, self.decoders = stubs[:2], stubs[2:]
        self.url = f"http://127.0.0.1:{threads.ports[0]}"
        self.client = httpx.Client(base_url=self.url, timeout=20, trust_env=False)

    def ask(self, prompt: Any = TEXT, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        headers = body.pop("headers", {})
        said = {"model": "stub", "prompt": prompt, **body}
        return self.post(path, said, headers)

    def post(self, path: str, said: Any, headers: dict[str, str] | None = None) -> httpx.Response:
        kind = {"content-type": "application/json", **(headers or {})}
        return self.client.post(path, content=json.dumps(said), headers=kind)

    def seen(self, role: str) -> list[dict[str, Any]]:
        """Bodies that the engines of a role got, and `headers`."""
        engines = self.prefillers if role == "prefill" else self.decoders
        return [{**s["body"], "headers": s["headers"]} for e in engines for s in e.seen]

    def swap(self, role: str, *ports: int) -> None:
        """Other engines in a role; the last has so much to do that it is asked last."""

        def swapped() -> None:
            fleet = self.parts.fleet
            for seat in [seat for seat in fleet.seats if seat.role == role]:
                fleet.remove(seat)
            for n, port in enumerate(ports):
                fleet.add(f"http://127.0.0.1:{port}", role).running += n * 1000

        self.threads.do(swapped)

    def metric(self, start: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(f"tierloom_proxy_{start}")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def until(self, true: Callable[[], object]) -> None:
        end = time.monotonic() + 20
        while not true():
            assert time.monotonic() < end, "it did not come about"
            time.sleep(0.01)

    def at_rest(self) -> bool:
        """No request is held against an engine, none waits."""
        seats = self.parts.fleet.seats
        return not any(s.running % 1000 or s.queued or s.waiting or s.streaming for s in seats)


@contextlib.contextmanager
def proxy() -> Iterator[tuple[ProxyParts, InThread]]:
    parts = ProxyParts(probe=0.2)
    with InThread([ProxyRoutes(parts).app], lifespan="on") as threads:
        yield parts, threads


def renew(parts: ProxyParts, ports: list[int], **options: Any) -> None:
    """As a proxy is that was just started over 2 prefillers and 2 decoders, the latter with
    LMCache's ports `receiver`."""
    receiver = options.pop("receiver", None)
    parts.__dict__.update(ProxyParts(**{"probe": 0.2, "fleet": parts.fleet, **options}).__dict__)
    for seat in parts.fleet.seats[:]:
        parts.fleet.remove(seat)
    parts.fleet.bytes_per_token = 4.0
    for port, role in zip(ports, ("prefill", "prefill", "decode", "decode"), strict=True):
        parts.fleet.add(f"http://127.0.0.1:{port}", role, receiver if role == "decode" else None)


class RawServer:
    """Answers whatever comes with the same bytes, in pieces, and hangs up; counts requests."""

    def __init__(self, *pieces: bytes, hang: bool = False) -> None:
        self.pieces, self.hang, self.taken = pieces, hang, 0
        self.end = threading.Event()

    def __enter__(self) -> RawServer:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        return self

    def _serve(self) -> None:
        held = []
        while True:
            try:
                conn, _ = self.sock.accept()
            except OSError:
                break
            with contextlib.suppress(OSError):
                conn.settimeout(5)
                self.taken += conn.recv(1 << 20).startswith(b"POST")  # not of probes
                conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for piece in self.pieces:
                    conn.sendall(piece)
                    time.sleep(0.002)
            if self.hang:
                held.append(conn)
            else:
                conn.close()
        for conn in held:
            conn.close()

    def __exit__(self, *_: object) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.thread.join(5)
