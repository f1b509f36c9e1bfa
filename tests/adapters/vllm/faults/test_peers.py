"""Two engines that serve what they keep: one finds what the other has computed, also when the other
is gone by then."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any

from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in socks]


def test_one_finds_what_the_other_computed(
    engine: Engine, llama: Path, expect: Expect, tmp_path: Path
) -> None:
    ports = free_ports(2)
    peers = ", ".join(f"127.0.0.1:{port}" for port in ports)

    def kv(n: int) -> dict[str, Any]:
        return transfer(
            "peer",
            **{
                "tiers.warm.path": str(tmp_path / f"kv-{n}"), "tiers.warm.capacity": "256 MiB",
                "tiers.warm.segment": "32 MiB", "serve.listen": f"127.0.0.1:{ports[n]}",
                "tiers.near.directory": [peers], "tiers.near.timeout": "10 s",
                "tierloom.wait": "10 s",  # the machine may be slow
            },
        )  # fmt: skip

    tokens, others, last = (prompt(1100, seed=seed) for seed in (51, 52, 53))
    with contextlib.closing(Engine(tmp_path, "other")) as other:
        other.use(llama, kv(0))
        engine.use(llama, kv(1))
        for tokens_ in (tokens, last):
            expect(other, tokens_, cached=0)
        expect(engine, others, cached=0)
        other.settle()
        engine.settle()
        expect(engine, tokens, cached=1088)
        expect(other, others, cached=1088)
        engine.settle()
        other.settle()
        engine.forget()
        expect(engine, tokens, cached=1088)
        other.kill()
        expect(engine, last, cached=0)
        engine.settle()
        engine.forget()
        expect(engine, tokens, cached=1088)
        expect(engine, last, cached=1088)
        engine.settle()
