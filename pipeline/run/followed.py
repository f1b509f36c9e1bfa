"""What requests do, told call by call to who follows them: when each stage worked, and which calls
of tiers moved objects within that.

Nothing here is imported, and nothing is called for it, before `follow` of a pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

from tierloom.pipeline.run.graph_runner import GraphRunner
from tierloom.stages.contract.request import Request
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker


class TierCall(NamedTuple):
    """One call that moved objects. `begin`, `end`: seconds of `time.perf_counter`."""

    tier: str
    way: str
    """`reads` or `puts`."""
    nbytes: int
    begin: float
    end: float


class FollowedCall(NamedTuple):
    """One call of a stage, or, with an empty `stage`, the request's end; times as above."""

    request: Request
    stage: str
    chunks: int
    calls: tuple[TierCall, ...]
    begin: float
    end: float


_CALLS: ContextVar[list[TierCall]] = ContextVar("calls")
"""Of the stage that works now."""


def follow_requests(
    runners: Mapping[str, GraphRunner], tiers: Mapping[str, CircuitBreaker],
    tell: Callable[[FollowedCall], None],
) -> None:  # fmt: skip
    """From now on `tell` is called on the loop, and must return at once."""
    for runner in runners.values():
        runner.answer = partial(_answered, tell, runner.answer)
        for stage, meter in runner.meters.items():
            meter.enter = partial(_entered, tell, stage)
    for name, tier in tiers.items():
        tier.timed = partial(_timed, name, tier.timed)


def _entered(
    tell: Callable[[FollowedCall], None], stage: str, item: Any
) -> Callable[[float, float], None]:
    """A stage begins to work on a request or a batch; what is returned is told when it ends."""
    calls: list[TierCall] = []
    _CALLS.set(calls)

    def left(begin: float, end: float) -> None:
        request = item if isinstance(item, Request) else item.request
        chunks = len(request.chunks if item is request else item.resources.chunks)
        tell(FollowedCall(request, stage, chunks, tuple(calls), begin, end))

    return left


def _timed(
    tier: str, before: Callable[[str, int, float], None] | None, way: str, nbytes: int,
    seconds: float,
) -> None:  # fmt: skip
    if before is not None:
        before(way, nbytes, seconds)
    if (calls := _CALLS.get(None)) is not None:
        end = time.perf_counter()
        calls.append(TierCall(tier, way, nbytes, end - seconds, end))


def _answered(
    tell: Callable[[FollowedCall], None], before: Callable[[Request], None], request: Request
) -> None:
    before(request)
    end, took = time.perf_counter(), time.monotonic() - request.started
    tell(FollowedCall(request, "", len(request.chunks), (), end - took, end))
