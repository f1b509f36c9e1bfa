"""`tierloom standalone`: a pipeline without a model or a GPU, as a service and as a load."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tierloom.adapters.made_up.group_pipelines import any_config, open_groups
from tierloom.adapters.made_up.kv_groups import kv_groups
from tierloom.adapters.made_up.round_trip import PATIENT, RoundTrip
from tierloom.stages.contract.request import Receipt
from tierloom.stages.display.amounts import size_text, time_text

SHAPE = "(2,16,256,8,128):bfloat16:4"
LATENT = "(1,16,256,1,576):bfloat16:8"
"""Of --use-mla."""
_SAID_EVERY = 10.0
_LAST = 10_000
"""Requests whose times are remembered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StandaloneOptions:
    """What the command was told."""

    config: str
    overrides: Mapping[str, Any]
    shape: str
    """Empty: `SHAPE`, or `LATENT`."""
    use_mla: bool
    device: str
    model: str
    http: str
    """Empty: no door."""
    token_file: str
    load: float
    """Requests per second; 0: none."""
    prompts: int
    """That are asked for again; older ones are deleted."""
    again: float
    """Share of requests that ask for a prompt that was stored before."""
    seconds: float
    """0: until a signal."""
    once: bool
    json: Path | None
    seed: int | None


class MadeUpLoad:
    """Prompts of random numbers, stored and asked for again; counts what became of them."""

    def __init__(self, trips: Sequence[RoundTrip], options: StandaloneOptions) -> None:
        self._trips, self._options = trips, options
        self._random = np.random.default_rng(options.seed)
        self._kept: deque[int] = deque()
        self._next = 0
        self.wrong: list[str] = []
        self.requests: Counter[str] = Counter()
        self.steps = self.asked = self.came = 0
        """Requests of all groups together; tokens of retrieves, and those that were in place."""
        self.lost: Counter[str] = Counter()
        self.took = {graph: deque[float](maxlen=_LAST) for graph in ("store", "retrieve")}

    def step(self, deadline: float | None = None) -> None:
        """One request: a prompt kept before is brought back; or a new one is stored, too."""
        self.steps += 1
        old = bool(self._kept) and self._random.random() < self._options.again
        if old:
            number = int(self._kept[self._random.integers(len(self._kept))])
        else:
            number, self._next = self._next, self._next + 1
            self._kept.append(number)
            if len(self._kept) > self._options.prompts:
                self._forget(self._kept.popleft())
        for trip in self._trips:
            if not old:
                self._count("store", trip.store(number, deadline))
            receipt, bad = trip.retrieve(number, deadline)
            self._count("retrieve", receipt)
            self.asked, self.came = self.asked + trip.tokens, self.came + receipt.tokens
            if bad:
                self.wrong.append(f"{trip.group}: prompt {number}: {bad}")

    def close(self) -> None:
        """Leave nothing in stores that others use."""
        while self._kept:
            self._forget(self._kept.popleft())

    def figures(self, seconds: float) -> dict[str, Any]:
        """Counts, and seconds of requests (median and 99th of 100) for each direction."""
        return {
            "requests": dict(self.requests), "seconds": seconds,
            "rate": self.steps / max(seconds, 1e-9),
            "asked_tokens": self.asked, "hit_tokens": self.came, "lost": dict(self.lost),
            "wrong": list(self.wrong),
            **{f"{graph}_s": {"p50": median(took), "p99": sorted(took)[int(0.99 * len(took))]}
               for graph, took in self.took.items() if took},
        }  # fmt: skip

    def _count(self, graph: str, receipt: Receipt) -> None:
        self.requests[graph] += 1
        self.took[graph].append(receipt.seconds)
        for cause, chunks in receipt.lost.items():
            self.lost[cause.name.lower()] += chunks

    def _forget(self, number: int) -> None:
        for trip in self._trips:
            trip.forget(number)


def run_standalone(options: StandaloneOptions, say: Callable[..., None]) -> int:
    """What the command does; the exit code. `say(text, err=)`: to stdout, or stderr. Raises
    ConfigError, MissingPackage, TierDown, OSError."""
    groups = kv_groups(
        options.shape or (LATENT if options.use_mla else SHAPE), use_mla=options.use_mla
    )

    def warn(text: str) -> None:
        say(f"tierloom: {text}", err=True)

    def again(more: Mapping[str, Any]) -> Any:
        return any_config(options.config, {**options.overrides, **more}, lambda _: None)

    spec = any_config(options.config, options.overrides, warn)
    # nobody finds what another run has left
    seed = secrets.randbits(62) if options.seed is None else options.seed
    how = {"model": options.model, "device": options.device, "seed": seed}
    with open_groups(spec, again, groups, **how) as trips:
        if options.once:
            code, figures = _once(trips, say)
        else:
            with _until_signal() as ended:
                code, figures = _serve(trips, options, ended, say)
    figures = {"ok": code == 0, "config": spec.source, "seed": seed} | figures
    if options.json is not None:
        text = json.dumps(figures, indent=1) + "\n"
        if str(options.json) == "-":
            say(text, nl=False)
        else:
            options.json.write_text(text)
    return code


def _once(trips: Sequence[RoundTrip], say: Callable[..., None]) -> tuple[int, dict[str, Any]]:
    """One round. What it says goes to stderr, so that figures can go to stdout."""
    rows, wrong = [], []
    for trip in trips:
        done, bad = trip.every_tier(0)
        wrong += bad
        for tier in done:
            say(
                f"{trip.group}: {tier.tier}: {tier.tokens} tokens, {size_text(tier.nbytes)} in "
                f"{time_text(tier.seconds)}", err=True,
            )  # fmt: skip
        rows.append({
            "shape": str(trip.group), "tokens": trip.tokens, "lossy": trip.lossy,
            "bytes": trip.tokens * trip.group.token_bytes, "tiers": [t._asdict() for t in done],
        })  # fmt: skip
        if not done and not bad:
            wrong.append(f"{trip.group}: no tier that is written is read: nothing was compared")
    for text in wrong:
        say(f"tierloom: {text}", err=True)
    if not wrong:
        alike = "as close as its codecs promise" if any(t.lossy for t in trips) else "equal"
        say(f"every byte that was read back is {alike}", err=True)
    return int(bool(wrong)), {"groups": rows, "wrong": wrong}


def _serve(
    trips: Sequence[RoundTrip], options: StandaloneOptions, ended: threading.Event,
    say: Callable[..., None],
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Answer over HTTP, and make the load, until a signal or the end of the time."""
    load = MadeUpLoad(trips, options)
    with contextlib.ExitStack() as stack:
        door = None
        if options.http:
            from tierloom.adapters.door.http_door import serve_http

            pipes = [trip.pipe for trip in trips]
            door = serve_http(pipes, options.http, token_file=options.token_file)
            stack.callback(door.close)
            say(f"listening on {door.url}")
        stack.callback(load.close)
        began = time.monotonic()
        end = began + options.seconds if options.seconds else float("inf")
        if options.load:
            load.step(PATIENT)  # compiles: no share of the load
        _at_rate(load, options.load, end, ended, say)
        if door is not None:
            door.draining = "it is about to end"
        figures = load.figures(time.monotonic() - began)
    for text in load.wrong[:10]:
        say(f"tierloom: {text}", err=True)
    if options.load:
        say(_line(figures), err=True)
    return int(bool(load.wrong)), {"load": figures}


def _at_rate(
    load: MadeUpLoad, rate: float, end: float, ended: threading.Event, say: Callable[..., None]
) -> None:
    """Begin a request every 1/rate seconds, or as soon as the one before has ended; stop at the
    first byte that differs."""
    began = said = due = time.monotonic()
    while not ended.is_set() and not load.wrong and (now := time.monotonic()) < end:
        if not rate or due > now:
            ended.wait(min(end, due if rate else now + 1) - now)
            continue
        due = max(due + 1 / rate, now - 1)  # what could not be done in time is not made up for
        load.step()
        if now - said >= _SAID_EVERY:
            said = now
            say(_line(load.figures(now - began)), err=True)


def _line(figures: Mapping[str, Any]) -> str:
    share = figures["hit_tokens"] / max(1, figures["asked_tokens"])
    times = ", ".join(
        f"{graph} {time_text(figures[f'{graph}_s']['p50'])}"
        for graph in ("store", "retrieve") if f"{graph}_s" in figures
    )  # fmt: skip
    counts = figures["requests"]
    return (
        f"{counts.get('store', 0)} stores and {counts.get('retrieve', 0)} retrieves in "
        f"{figures['seconds']:.0f} s, {share:.1%} of the tokens asked for came back; {times}"
    )


@contextlib.contextmanager
def _until_signal() -> Iterator[threading.Event]:
    """Set by SIGTERM and SIGINT, whose former meaning is back afterwards."""
    ended = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield ended
        return
    former = {n: signal.signal(n, lambda *_: ended.set()) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ended
    finally:
        for number, old in former.items():
            signal.signal(number, old)
