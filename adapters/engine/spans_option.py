"""Whether requests are to become OpenTelemetry spans. Light: engines ask it at each start."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Mapping

from tierloom.pipeline.pipeline import Pipeline

log = logging.getLogger("tierloom.spans")

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def spans_wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """By the standard variables; vLLM's `--otlp-traces-endpoint` sets one of them."""
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    kinds = environ.get("OTEL_TRACES_EXPORTER", "otlp").replace(" ", "").split(",")
    return not off and "otlp" in kinds and any(environ.get(name) for name in _ENDPOINTS)


def trace_requests(pipes: Iterable[Pipeline]) -> Callable[[], None]:
    """Spans of all requests of pipelines from now on, where the variables OTEL_* ask for them and
    it is possible; else the log says why not. What is returned sends those that are left: call it
    after the pipelines were closed."""
    if not spans_wanted():
        return _nothing
    if importlib.util.find_spec("opentelemetry") is None:
        log.warning("OTEL_* ask for spans: pip install 'tierloom[otel]'")
        return _nothing
    try:
        from tierloom.adapters.engine.otlp_spans import OtlpSpans

        spans = OtlpSpans()
    except Exception as error:  # a package that is missing, a variable that cannot be read
        log.warning("no spans: %s: %s; pip install 'tierloom[otel]'", type(error).__name__, error)
        return _nothing
    for pipe in pipes:
        spans.follow(pipe)
    return spans.close


def _nothing() -> None: ...
