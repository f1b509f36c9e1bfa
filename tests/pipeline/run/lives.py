"""A process with open pipelines that forks, is interrupted, and ends: run by `test_processes.py`.

Prints a line for each thing that went as it should; its folder is the one that it is given.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from conftest import Engine, config, tokens, with_disk

import tierloom
from tierloom import Closed

FOLDER = Path(sys.argv[1])
TOKENS = 192


def refused_in_child(pipe, engine) -> bool:
    """Whether all calls are refused at once in a child that is forked now."""
    child = os.fork()
    if not child:
        signal.alarm(20)  # what hangs ends by that
        ids, slots = tokens(TOKENS), list(range(TOKENS))
        calls = [
            lambda: pipe.lookup(ids),
            lambda: pipe.store(ids, engine.caches, slots),
            lambda: pipe.retrieve(ids, engine.caches, slots),
            lambda: pipe.clear(),
            lambda: pipe.pin(ids),
            lambda: pipe.begin_lookup(ids),
        ]
        allowed, closed = [], pipe.arena._map.closed
        for call in calls:
            with suppress(Closed):
                allowed.append(call())
        pipe.stats()
        pipe.close()
        os._exit(len(allowed) + (pipe.arena._map.closed != closed))
    return os.waitpid(child, 0)[1] == 0


def slow(at: str, seconds: str) -> dict[str, str]:
    return {"use": "slow", "capacity": "8 MiB", at: seconds}


def forks() -> None:
    engine = Engine()
    made = with_disk(FOLDER / "forks")
    pipe = tierloom.open(made, layout=engine.layout, model="m")
    slots = engine.slots(TOKENS)
    assert refused_in_child(pipe, engine)
    ticket = pipe.store(tokens(TOKENS), engine.caches, slots)
    assert refused_in_child(pipe, engine)
    assert ticket.wait(20).tokens == TOKENS
    target = engine.blank()
    got = pipe.retrieve(tokens(TOKENS), target.caches, slots)
    assert refused_in_child(pipe, engine)
    assert got.wait(20).tokens == TOKENS
    assert torch.equal(engine.rows(slots), target.rows(slots))
    busy = threading.Event()

    def ask() -> None:
        while not busy.is_set():
            pipe.lookup(tokens(TOKENS))
            pipe.stats()

    thread = threading.Thread(target=ask)
    thread.start()
    assert all(refused_in_child(pipe, engine) for _ in range(5))
    busy.set()
    thread.join()
    child = os.fork()
    if not child:
        signal.alarm(60)
        signal.pause()
        os._exit(0)
    pipe.close()
    assert refused_in_child(pipe, engine)
    with tierloom.open(made, layout=engine.layout, model="m") as again:  # the child lives
        assert again.lookup(tokens(TOKENS)) == TOKENS
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("forks", flush=True)


def interrupts() -> None:
    """Ctrl-C while a call waits for a tier that does not answer."""
    engine = Engine()
    for at in ("put", "read"):
        stuck = {"use": "stuck", "capacity": "8 MiB", "at": at}
        made = config(tiers__hot=stuck | {"timeout": "60 s"}, graphs__store__deadline="60 s")
        made["graphs"]["retrieve"]["deadline"] = "60 s"
        pipe = tierloom.open(made, layout=engine.layout, model="m")
        slots, target = engine.slots(TOKENS), engine.blank()
        ticket = pipe.store(tokens(TOKENS), engine.caches, slots)
        if at == "read":
            assert ticket.wait(20).tokens == TOKENS
            ticket = pipe.retrieve(tokens(TOKENS), target.caches, slots)
        before = [t.clone() for t in target.flat]
        began = time.monotonic()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            ticket.wait()
        except KeyboardInterrupt:
            assert ticket._request.memory.in_use.empty
            assert ticket._request.cancelled is not None
        else:
            raise AssertionError("it was not interrupted")
        assert ticket.future.result(20) is not None
        assert time.monotonic() - began < 30
        assert all(torch.equal(a, b) for a, b in zip(before, target.flat, strict=True))
        pipe.close()
    print("interrupts", flush=True)


def ends() -> None:
    """Without `close()`, with a store under way."""
    engine = Engine()
    pipe = tierloom.open(with_disk(FOLDER / "ends"), layout=engine.layout, model="m")
    slots = engine.slots(TOKENS)
    assert pipe.store(tokens(TOKENS), engine.caches, slots).wait(20).tokens == TOKENS
    pipe.store(tokens(TOKENS)[::-1].copy(), engine.caches, slots)
    globals()["kept"] = pipe
    print("ends", flush=True)


forks()
interrupts()
ends()
