"""The figures of a process as `prometheus_client` exports them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from tierloom import __version__
from tierloom.adapters.door.families import FAMILIES, samples

_METRICS = {
    "counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily,
}  # fmt: skip


class FiguresCollector:
    """A collector for any registry: `REGISTRY.register(FiguresCollector(read))`. It counts nothing:
    whenever it is asked it reads what is there."""

    def __init__(
        self, read: Callable[[], Mapping[str, Mapping[str, Any]]], *, prefix: str = "tierloom_",
        own: Mapping[str, tuple[str, float]] | None = None,
    ) -> None:  # fmt: skip
        """`read`: the parts' figures, as `Pipeline.stats` gives them, by name. `own`: more gauges,
        each with its help."""
        self._read, self._prefix, self._own = read, prefix, own or {}

    def describe(self) -> list[Metric]:
        """Nothing is read when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, those without a series too."""
        info = GaugeMetricFamily(self._prefix + "info", "The version.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        for name, (text, value) in self._own.items():
            yield GaugeMetricFamily(self._prefix + name, text, value=value)
        metrics: dict[str, Any] = {
            name: _METRICS[family.kind](self._prefix + name, family.help, labels=family.labels)
            for name, family in FAMILIES.items()
        }
        for (name, labels), value in samples(self._read()).items():
            if FAMILIES[name].kind == "histogram":
                metrics[name].add_metric(list(labels), _buckets(value), value["sum"])
            else:
                metrics[name].add_metric(list(labels), value)
        yield from metrics.values()


def exposition(collector: FiguresCollector, accept: str) -> tuple[bytes, str]:
    """What a scrape gets, and its content type; `accept`: the header of who scrapes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    encode, kind = choose_encoder(accept)
    return encode(registry), kind


def _buckets(histogram: Mapping[str, Any]) -> list[tuple[str, int]]:
    bounds = [*(str(float(bound)) for bound in histogram["bounds"]), "+Inf"]
    return list(zip(bounds, accumulate(histogram["counts"]), strict=True))
