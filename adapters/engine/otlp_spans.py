"""Requests of pipelines as OpenTelemetry spans, over OTLP: a request, its stages' calls, and the
tiers' calls within them.

Imported only where OTEL_* variables ask for it. The pipeline's loop puts what happened into a
queue; a thread makes spans of it and sends them.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tierloom.pipeline.pipeline import Pipeline
from tierloom.pipeline.run.followed import FollowedCall
from tierloom.stages.contract.request import Request

log = logging.getLogger("tierloom.spans")

_WAITING = 8192
"""Calls that wait to become spans, at most."""
_AT_ONCE, _EVERY = 512, 1.0
"""Spans of one message, and seconds between two at most."""


class OtlpSpans:
    """From the start on; `close` sends what is left, as the end of the process does."""

    def __init__(self, exporter: Any = None, environ: Mapping[str, str] = os.environ) -> None:
        """`exporter`: else the one that OTEL_EXPORTER_OTLP_* say. Raises ImportError where its
        package is not there."""
        service = {"service.name": "tierloom"}
        named = "OTEL_SERVICE_NAME" in environ
        named |= "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        provider = TracerProvider(resource=Resource.create({} if named else service))
        provider.add_span_processor(self)  # type: ignore[arg-type,unused-ignore]  # by its methods
        self._tracer = provider.get_tracer("tierloom")
        self._exporter = exporter or _exporter(environ)
        now, ns = time.perf_counter(), time.time_ns()
        self._epoch = ns - round(now * 1e9)
        self._calls: queue.SimpleQueue[FollowedCall | None] = queue.SimpleQueue()
        self._dropped = 0
        self._stages: WeakKeyDictionary[Request, list[FollowedCall]] = WeakKeyDictionary()
        self._over: WeakKeyDictionary[Request, Any] = WeakKeyDictionary()
        """Context of requests' spans: a fork's later branches may still put."""
        self._ended: list[Any] = []
        self._thread = threading.Thread(target=self._run, name="tierloom-spans", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def follow(self, pipe: Pipeline) -> None:
        pipe.follow(self._put)

    def close(self, timeout: float = 5.0) -> None:
        """Idempotent."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._calls.put(None)
            self._thread.join(timeout)
        if self._dropped:
            log.warning("%d calls became no span: their receiver is too slow", self._dropped)
            self._dropped = 0

    def _put(self, call: FollowedCall) -> None:
        """On the pipeline's loop."""
        if self._calls.qsize() < _WAITING:
            self._calls.put(call)
        else:
            self._dropped += 1

    def _run(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=_EVERY)
            except queue.Empty:
                self._send()
                continue
            if call is None:
                self._send()
                with contextlib.suppress(Exception):
                    self._exporter.shutdown()
                return
            try:
                self._made(call)
            except Exception:
                log.exception("a request has no spans")
            if len(self._ended) >= _AT_ONCE:
                self._send()

    def _made(self, call: FollowedCall) -> None:
        request = call.request
        if call.stage:
            if (over := self._over.get(request)) is None:
                self._stages.setdefault(request, []).append(call)
            else:
                self._stage(call, over)
            return
        parent = TraceContextTextMapPropagator().extract({"traceparent": request.trace})
        receipt = request.future.result()
        told = {"tokens": receipt.tokens, "bytes": receipt.nbytes, "chunks": call.chunks}
        told |= {f"lost.{cause.name.lower()}": n for cause, n in receipt.lost.items()}
        context = self._span(f"tierloom {request.graph}", parent, call.begin, call.end, told)
        self._over[request] = context
        for stage in self._stages.pop(request, ()):
            self._stage(stage, context)

    def _stage(self, call: FollowedCall, parent: Any) -> None:
        told = {"chunks": call.chunks}
        context = self._span(f"stage {call.stage}", parent, call.begin, call.end, told)
        for one in call.calls:
            size = {"bytes": one.nbytes}
            self._span(f"tier {one.tier} {one.way}", context, one.begin, one.end, size)

    def _span(
        self, name: str, parent: Any, begin: float, end: float, told: Mapping[str, Any]
    ) -> Any:
        """One span, begun and ended; its context."""
        attributes = {f"tierloom.{key}": value for key, value in told.items()}
        started = self._epoch + round(begin * 1e9)
        span = self._tracer.start_span(name, parent, attributes=attributes, start_time=started)
        span.end(self._epoch + round(end * 1e9))
        return trace.set_span_in_context(span, parent)

    def _send(self) -> None:
        ended, self._ended = self._ended, []
        try:
            if ended:
                self._exporter.export(ended)
        except Exception as error:  # whatever a receiver or its client does
            log.warning("%d spans were not sent: %s", len(ended), error)

    # -- what a TracerProvider asks of a SpanProcessor ---------------------------------------------

    def on_start(self, span: Any, parent_context: Any = None) -> None: ...

    def _on_ending(self, span: Any) -> None: ...

    def on_end(self, span: Any) -> None:
        if span.context.trace_flags.sampled:
            self._ended.append(span)

    def shutdown(self) -> None: ...

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


def _exporter(environ: Mapping[str, str]) -> Any:
    """gRPC unless the variables say HTTP, as vLLM has it."""
    either = environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    if environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", either) == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    return OTLPSpanExporter()
