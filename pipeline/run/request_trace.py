"""Which stage worked when on which request, noted while somebody asks for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tierloom.pipeline.run.meters import Meter
from tierloom.stages.contract.request import Request
from tierloom.stages.errors import InputError

_MOST = 100_000
"""Spans of a trace; older ones are dropped."""
_DRAWN = 12
"""Requests in a picture."""


class StageSpan(NamedTuple):
    """One call of a stage, for a request or a batch of its chunks."""

    request: int
    """Requests count from 1, in the order in which they were first worked on."""
    graph: str
    stage: str
    begin: float
    """Seconds since the trace began."""
    end: float
    chunks: int
    """In the plan, or in the batch."""


class Trace:
    """The spans of every request that a pipeline works on from `with` on, until it ends.

        with pipe.trace() as trace:
            pipe.store(tokens, caches, slots).wait()
        trace.spans

    Off, it costs the pipeline nothing but a look at an attribute per batch. The last 100,000 spans
    are kept. In a notebook it is shown as a waterfall. Spans are noted by the pipeline's thread.
    """

    def __init__(self, meters: Mapping[str, Mapping[str, Meter]]) -> None:
        """`meters`: by graph and stage."""
        self._meters = meters
        self._spans: deque[StageSpan] = deque(maxlen=_MOST)
        self._numbers: WeakKeyDictionary[Request, int] = WeakKeyDictionary()
        self._count, self._began, self._called = 0, 0.0, 0.0
        self._asked: dict[int, float] = {}

    def __enter__(self) -> Trace:
        """Raises InputError while another trace of the pipeline runs."""
        if any(m.watch is not None for graph in self._meters.values() for m in graph.values()):
            raise InputError("another trace of this pipeline is running: end it first")
        self._began, self._called = time.perf_counter(), time.monotonic()
        for graph, meters in self._meters.items():
            for stage, meter in meters.items():
                meter.watch = partial(self._note, graph, stage)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for graph in self._meters.values():
            for meter in graph.values():
                meter.watch = None

    @property
    def spans(self) -> list[StageSpan]:
        """In the order in which they ended; whole when each request's `wait()` has returned, but
        for tiers that a fork's later branches still put into."""
        return list(self._spans)

    def _note(self, graph: str, stage: str, item: Any, begin: float, end: float) -> None:
        request = item if isinstance(item, Request) else item.request
        number = self._numbers.get(request)
        if number is None:
            self._count = number = self._numbers[request] = self._count + 1
            self._asked[number] = request.started - self._called
            self._asked.pop(number - _MOST, None)
        chunks = len(request.chunks if item is request else item.resources.chunks)
        at = begin - self._began, end - self._began
        self._spans.append(StageSpan(number, graph, stage, *at, chunks))

    def __repr__(self) -> str:
        return f"<Trace of {self._count} requests: {len(self._spans)} spans>"

    def _repr_html_(self) -> str:
        """A waterfall of the last requests: a row for each stage, a bar for each call."""
        from tierloom.pipeline.run.waterfall import waterfall_svg

        first = self._count - _DRAWN
        last = [s for s in self.spans if s.request > first]
        return waterfall_svg(last, {n: at for n, at in list(self._asked.items()) if n > first})
