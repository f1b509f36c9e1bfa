"""A server that hangs, dies and comes back under a pipeline with its preset's limits.

How late the first retrieve is, which waits for the server in vain; how long those take that follow
when it is left alone; and how soon all is stored and found again when it is back.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import servers
from cases import SHAPES, Engine
from remote.places import PLACES

import tierloom
from tierloom.pipeline.config.load import load_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tierloom import Pipeline

SHAPE, TOKENS = SHAPES["SmolLM2"], 512
ROOM = 256 << 20
NEXT = 10
PATIENCE = 60.0


def faults(name: str, folder: Path) -> dict[str, dict[str, float]]:
    """By what happens to which server, as `Subject.suffer` says it."""
    found: dict[str, dict[str, float]] = {}
    with PLACES[name](folder, ROOM) as place:
        if not place.servers:
            return found
        with subject(place.preset, place.options) as its:
            for who, process in place.servers.items():
                found[f"{who} hangs"] = its.suffer(process.pause, process.resume)
                found[f"{who} is killed"] = its.suffer(process.kill, process.start)
    return found


def failover() -> dict[str, dict[str, float]]:
    """Sentinels name another master; the one that was killed does not come back."""
    with servers.sentinels() as ((master, _), watchers):
        hosts = ",".join(f"127.0.0.1:{watcher.port}" for watcher in watchers)
        with subject("sentinel", {"use": "redis", "url": f"redis-sentinel://{hosts}/kv"}) as its:
            return {"master is killed, another takes over": its.suffer(master.kill, None)}


@contextmanager
def subject(preset: str, options: dict[str, Any]) -> Iterator[Subject]:
    """A pipeline of the preset, but for its memory: all comes from the remote tier."""
    tier = next(name for name, tier in load_config(preset).tiers.items() if tier.use != "memory")
    graphs = {
        "store": {"stages": {"host": None, "hot": None, tier: {"from": "pack"}}},
        "retrieve": {"stages": {"plan": {"tiers": [tier]}, "fetch": {"promote": None}}},
    }
    tiers = {"hot": None, tier: options}
    source = {"version": 1, "extends": preset, "tiers": tiers, "graphs": graphs}
    spec, engine = load_config(source), Engine(SHAPE, TOKENS)
    with tierloom.open(source, layout=engine.layout, model="bench") as pipe:
        deadline, fails = spec.graphs["retrieve"].options.deadline, spec.tiers[tier].breaker.fails
        yield Subject(pipe, engine, deadline, fails)


class Subject:
    """What requests see of a tier that fails."""

    def __init__(self, pipe: Pipeline, engine: Engine, deadline: float, fails: int) -> None:
        self.pipe, self.engine, self.deadline, self.fails = pipe, engine, deadline, fails
        self.last = engine.prompt()

    def suffer(
        self, stop: Callable[[], object], back: Callable[[], object] | None
    ) -> dict[str, float]:
        """Milliseconds: the deadline, the `first` retrieve, how far it is `late`, the longest of
        the `next` ones; seconds until the tier is used again, since it is `back`, or, where nothing
        brings it back, since it stopped."""
        self._wait()
        stop()
        stopped = time.perf_counter()
        first = self._retrieve()
        for _ in range(self.fails - 1):  # the last of them opens the breaker
            self._retrieve()
        following = max(self._retrieve() for _ in range(NEXT))
        if back is not None:
            back()
            stopped = time.perf_counter()
        self._wait()
        return {
            "deadline": 1e3 * self.deadline, "first": 1e3 * first,
            "late": 1e3 * max(0.0, first - self.deadline), "next": 1e3 * following,
            "back": time.perf_counter() - stopped,
        }  # fmt: skip

    def _retrieve(self) -> float:
        """Seconds until it is said that nothing came."""
        begun = time.perf_counter()
        receipt = self.pipe.retrieve(self.last, self.engine.caches, self.engine.target).wait()
        took = time.perf_counter() - begun
        assert not receipt.tokens, receipt
        return took

    def _wait(self) -> None:
        """Until a new prompt is stored, and comes back as it was."""
        pipe, engine = self.pipe, self.engine
        end = time.perf_counter() + PATIENCE
        while time.perf_counter() < end:
            self.last = engine.prompt()
            stored = pipe.store(self.last, engine.caches, engine.source).wait()
            if stored.tokens == TOKENS and not stored.lost:
                engine.blank()
                got = pipe.retrieve(self.last, engine.caches, engine.target).wait()
                if got.tokens == TOKENS:
                    assert engine.same(), "the bytes that came back are not those that were stored"
                    return
            time.sleep(0.02)
        raise AssertionError(f"not used again after {PATIENCE:g} s: {stored}")
