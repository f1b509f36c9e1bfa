"""Clients that flood a server, stall it and take every place: the others are served meanwhile."""

# ruff: noqa: F811 (fixtures of another module)

from __future__ import annotations

import contextlib
import random
import threading
from typing import TYPE_CHECKING

import pytest

from tierloom.pipeline.serve import listener
from tierloom.stages.errors import Lost
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.protocol import Kind
from tierloom.testing import ALL, SIZE, key_of, mutations

from .raw_client import connected, receive, reset, welcomed
from .test_server_hostile import eventually, fill, offer, question, unharmed, url, within  # noqa: F401 (two are fixtures)

if TYPE_CHECKING:
    from store_server import Within


def test_who_does_not_read_is_sent_away(within: Within, url: str) -> None:
    """Asked for more than the buffers hold, and flooded with questions: both only stall it."""
    arena = Arena(2 * SIZE, huge_pages=False)
    fill(url, arena, *range(10, 20))
    wanted = [wire.Wanted(key_of(seed), 0, ALL, 0) for seed in range(10, 20)] * 25
    greedy = [welcomed(url) for _ in range(3)]
    for sock in greedy:
        sock.settimeout(0.2)
        with contextlib.suppress(TimeoutError, ConnectionError):
            for _ in range(20):
                sock.sendall(question(Kind.GET, wire.pack(*wanted)))
    unharmed(url)
    eventually(lambda: not within.serving.listener.sessions)
    for sock in greedy:
        sock.close()
    unharmed(url)
    arena.close()


def test_who_floods_is_served_in_turn(url: str) -> None:
    """Questions without end, each answered at once: others have their turn between any two."""
    stop = threading.Event()
    flood = question(Kind.PING) * 500

    def flooding() -> None:
        with welcomed(url) as sock:
            while not stop.is_set():
                sock.sendall(flood)
                for _ in range(500):
                    receive(sock)

    threads = [threading.Thread(target=flooding) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            unharmed(url)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_strangers_cannot_take_every_place(within: Within, url: str) -> None:
    strangers = [connected(url) for _ in range(listener._STRANGERS + 20)]
    eventually(lambda: len(within.serving.listener.sessions) == listener._STRANGERS)
    eventually(lambda: not within.serving.listener.sessions)
    unharmed(url)
    for sock in strangers:
        sock.close()


def test_a_burst_of_strangers(within: Within, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are all there before the server looks."""
    monkeypatch.setattr(listener, "_HELLO", 60.0)
    looks = threading.Event()

    async def busy() -> None:
        assert looks.wait(30)

    caller = threading.Thread(target=within.call, args=[busy])
    caller.start()
    strangers = [connected(url) for _ in range(3 * listener._STRANGERS)]
    looks.set()
    caller.join()
    greeted = sum(sock.recv(1) != b"" for sock in strangers)
    assert greeted == listener._STRANGERS
    for sock in strangers:
        sock.close()
    eventually(lambda: not within.serving.listener.sessions)
    unharmed(url)


@pytest.mark.slow
def test_mutated_messages_over_a_socket(url: str, within: Within) -> None:
    """Some thousands; the one client that behaves is served all the while."""
    messages = [
        question(Kind.HAS, key_of(1) * 3),
        question(Kind.GET, wire.pack(wire.Wanted(key_of(1), 0, 3, 0))),
        question(Kind.PUT, wire.pack(wire.Offer(key_of(1), SIZE))),
        question(Kind.DROP, key_of(1)), question(Kind.STAT), question(Kind.PING),
        question(Kind.RETURN, wire.pack_ids([1, 2])), question(Kind.BORROW, key_of(1)),
    ]  # fmt: skip
    good = welcomed(url)
    rng = random.Random(1)
    for seed, message in enumerate(messages):
        for raw in mutations(message, 250, seed):
            sock = welcomed(url)
            with contextlib.suppress(ConnectionError):
                sock.sendall(raw)
                if rng.random() < 0.2:
                    sock.settimeout(0.01)
                    with contextlib.suppress(TimeoutError):
                        sock.recv(4096)
            reset(sock) if rng.random() < 0.5 else sock.close()
            if rng.random() < 0.02:
                good.sendall(question(Kind.HAS, key_of(1)))
                assert receive(good) == (Kind.HAD, 7, bytes([Lost.ABSENT]))
    good.close()
