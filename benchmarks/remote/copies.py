"""Store and retrieve through the public API: CPU time of client and servers, beside a memcpy.

Llama-3.1-8B's shapes: objects of 32 MiB, checksummed when stored and verified when retrieved, into
a tier that is full and evicts as much as comes.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from cases import CHUNK, Engine, clear
from yardstick import GB, Memcpy, cpu_of, idle, timed

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from remote.places import Place

    from tierloom import Pipeline

TOKENS = 2048
"""Of a prompt: 8 objects."""
KEPT = 4
"""Prompts that fit into a server."""
SETTLED = 0.05
"""Seconds that a server has for what it still does behind a request."""


def copies(pipe: Pipeline, place: Place, engine: Engine, rounds: int) -> dict[str, Any]:
    """`store`: of prompts that are new; `retrieve`: of one that is there. Both as `medians`."""
    memcpy = Memcpy()

    def ready() -> np.ndarray:
        """A new prompt, for which there is room."""
        if not place.evicts:
            clear(pipe, "cold")
        return engine.prompt()

    def store(tokens: np.ndarray) -> None:
        receipt = pipe.store(tokens, engine.caches, engine.source).wait()
        done = (receipt.tokens, receipt.lost, receipt.tiers)
        assert done == (TOKENS, {}, {"cold": TOKENS // CHUNK}), receipt

    def retrieve(tokens: np.ndarray) -> None:
        receipt = pipe.retrieve(tokens, engine.caches, engine.target).wait()
        assert (receipt.tokens, receipt.lost) == (TOKENS, {}), receipt

    for _ in range(KEPT + 1):  # pages and processes are warm, the server is full
        time.sleep(place.rest)
        last = ready()
        store(last)
        engine.blank()
        retrieve(last)
        assert engine.same(), "the bytes that came back are not those that were stored"
    idle()
    measure = partial(medians, place=place, nbytes=engine.nbytes, rounds=rounds, memcpy=memcpy)
    found = {"store": measure(store, ready)}
    clear(pipe, "cold")  # of a full server's objects the eviction may have torn some
    store(last)
    idle()
    engine.blank()
    found["retrieve"] = measure(retrieve, lambda: last)
    assert engine.same(), "the bytes that came back are not those that were stored"
    return found


def medians(
    run: Callable[[np.ndarray], None], ready: Callable[[], np.ndarray], *, place: Place,
    nbytes: int, rounds: int, memcpy: Memcpy,
) -> dict[str, float]:  # fmt: skip
    """Of rounds: seconds of CPU per GB, client and servers; GB/s; the same of a memcpy."""
    pids = [process.pid for process in place.servers.values()]
    size = nbytes / GB
    rows = []
    for _ in range(rounds):
        tokens = ready()
        time.sleep(place.rest)
        copy = timed(partial(memcpy, nbytes))
        before = cpu_of(*pids)
        one = timed(partial(run, tokens))
        time.sleep(SETTLED)  # what the server still does behind it counts, too
        own = cpu_of(*pids) - before
        rows.append((one.cpu + own, one.cpu, own, one.wall, copy.cpu, copy.wall))
    both, client, server, wall, copied, copying = map(statistics.median, zip(*rows, strict=True))
    return {
        "cpu_s_per_gb": both / size, "client": client / size, "server": server / size,
        "gb_per_s": size / wall, "memcpy_cpu_s_per_gb": copied / size,
        "of_memcpy": copying / wall,
    }  # fmt: skip
