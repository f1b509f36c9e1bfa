"""The figures of a process as `prometheus_client` exports them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.utils import floatToGoString

from tierloom import __version__
from tierloom.adapters.door.families import FAMILIES, Family, samples

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

    def text(self, *, openmetrics: bool) -> str:
        """What the encoders of `prometheus_client` make of `collect`, in less time: the names here
        are known to be valid, and labels are written once."""
        families = {"info": Family("gauge", "The version.", ("version",))}
        families |= {name: Family("gauge", text) for name, (text, _) in self._own.items()}
        families |= FAMILIES
        lines: dict[str, list[str]] = {name: [] for name in families}
        values = samples(self._read())
        values |= {(name, ()): value for name, (_, value) in self._own.items()}
        values["info", (__version__,)] = 1
        for (name, labels), value in values.items():
            lines[name] += _lines(self._prefix + name, families[name], labels, value)
        written = []
        for name, family in families.items():
            written.append(_head(self._prefix + name, family, openmetrics))
            written += lines[name]
        return "".join(written) + "# EOF\n" * openmetrics


def exposition(collector: FiguresCollector, accept: str) -> tuple[bytes, str]:
    """What a scrape gets, and its content type; `accept`: the header of who scrapes."""
    kind = choose_encoder(accept)[1]
    return collector.text(openmetrics=kind.startswith("application/openmetrics")).encode(), kind


def _lines(name: str, family: Family, labels: tuple[str, ...], value: Any) -> list[str]:
    """The samples of one series."""
    if family.kind != "histogram":
        total = "_total" * (family.kind == "counter")
        return [f"{name}{total}{_labels(family.labels, labels)} {floatToGoString(value)}\n"]
    counts = _buckets(value)
    names = (*family.labels, "le")
    own = _labels(family.labels, labels)
    return [
        *(
            f"{name}_bucket{_labels(names, (*labels, le))} {floatToGoString(n)}\n"
            for le, n in counts
        ),
        f"{name}_count{own} {floatToGoString(counts[-1][1])}\n",
        f"{name}_sum{own} {floatToGoString(value['sum'])}\n",
    ]


@lru_cache(1024)
def _head(name: str, family: Family, openmetrics: bool) -> str:
    total = "_total" * (family.kind == "counter" and not openmetrics)
    return f"# HELP {name}{total} {family.help}\n# TYPE {name}{total} {family.kind}\n"


@lru_cache(4096)
def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    escaped = (v.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"") for v in values)
    pairs = sorted(zip(names, escaped, strict=True))
    return "{" + ",".join(f'{name}="{value}"' for name, value in pairs) + "}" if pairs else ""


def _buckets(histogram: Mapping[str, Any]) -> list[tuple[str, int]]:
    bounds = [*(str(float(bound)) for bound in histogram["bounds"]), "+Inf"]
    return list(zip(bounds, accumulate(histogram["counts"]), strict=True))
