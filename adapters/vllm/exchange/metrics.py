"""What the vLLM connector counts: for vLLM's periodic log line and for its /metrics.

Workers and scheduler count into `Stats`; vLLM carries them to the front process, adds them up, and
hands the plain dict to `PromMetrics`. Names that one of the two does not know are ignored, so that
processes of different versions get along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from tierloom.adapters.door.families import FAMILIES as OF_DOORS, gauges_of_many
from tierloom.pipeline.run.measures import NBYTES, SECONDS
from tierloom.stages.errors import Lost

COUNTS = {
    "asked_tokens": "Prompt tokens that were looked up.",
    "loads": "Loads of kept KV that ended, whole or in part.",
    "load_tokens": "Tokens whose KV was loaded instead of computed.",
    "load_bytes": "Bytes of KV placed in the engine's blocks.",
    "load_seconds": "Seconds from the start to the end of loads, added up.",
    "blends": "Loads among them that brought text captured elsewhere, repaired.",
    "blend_exact_tokens": "Of blended prompts, tokens of the exact prefix that were loaded.",
    "blend_tokens": "Of blended prompts, tokens of text captured elsewhere that were placed.",
    "blend_computed_tokens": "Of blended prompts, tokens that repairs computed.",
    "blend_seconds": "Seconds that repairs took, added up.",
    "load_failed_tokens": "Tokens promised to the scheduler that could not be loaded.",
    "stores": "Stores of computed KV that ended.",
    "store_tokens": "Tokens whose KV was stored.",
    "store_bytes": "Bytes of KV taken from the engine's blocks.",
    "store_seconds": "Seconds from the start to the end of stores, added up.",
}
"""Plain numbers of `Stats.data`, each a Prometheus counter `vllm:tierloom_<name>`."""

FAMILIES = {
    "hit_tokens": ("hit_tokens", "tier", "Tokens found, by the tier that had them."),
    "lost": ("lost_chunks", "cause", "Chunks that were not delivered or not kept, by cause."),
}
"""Dotted names of `Stats.data`: `hit_tokens.<tier>`, `lost.<cause>` -> (counter, label, help)."""

HISTOGRAMS = {
    "load_duration_seconds": ("Loads, from the start to the end.", SECONDS),
    "load_size_bytes": ("Bytes of KV placed by one load, in one worker.", NBYTES),
    "store_duration_seconds": ("Stores, from the start to the end.", SECONDS),
    "store_size_bytes": ("Bytes of KV taken by one store, in one worker.", NBYTES),
}
"""Lists of `Stats.data`, each a histogram `vllm:tierloom_<name>`."""
NOW = "now."
"""`now.<worker>` of `Stats.data`: that worker's gauges, as `gauges` of `families.py` gives them."""
_MOST = 1000
"""Observations of a histogram in one report."""


@dataclass
class Stats(KVConnectorStats):  # type: ignore[misc]  # no vLLM where types are checked
    """Numbers since the last report, in `data`: name -> a sum, a list of observations, or gauges.

    Counted by one thread; `take` hands out what there is. `data` is plain numbers in lists and
    mappings, so it survives any wire, and `Stats(data=...)` on the other side is the same again.
    """

    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = dict(self.data)  # vLLM shows the same dict to others, too

    def add(self, **numbers: float) -> None:
        """Add to several names at once: `add(loads=1, load_tokens=256)`."""
        for name, n in numbers.items():
            self.count(name, n)

    def count(self, name: str, n: float = 1) -> None:
        """Add `n` to `name`; needed for dotted names: `count("lost.corrupt")`."""
        if n:
            self.data[name] = self.data.get(name, 0) + n

    def note(self, name: str, value: float) -> None:
        """One observation of a histogram."""
        self.data[name] = [*self.data.get(name, ()), value][-_MOST:]

    def take(self) -> Stats | None:
        """What was counted, as an object of its own; nothing is left here. None: nothing was."""
        if not self.data:
            return None
        taken = Stats(data=self.data)
        self.reset()
        return taken

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> Stats:
        for name, n in other.data.items():
            if _is_number(n):
                self.count(name, n)
            elif isinstance(n, list):
                self.data[name] = [*self.data.get(name, ()), *n][-_MOST:]
            elif name.startswith(NOW):
                self.data[name] = n
        return self

    def is_empty(self) -> bool:
        return not any(n for name, n in self.data.items() if not name.startswith(NOW))

    def to_dict(self) -> dict[str, Any]:
        return dict(self.data)

    def reduce(self) -> dict[str, int | float]:
        """Readable figures, of what is not zero; GB are 10^9 bytes."""
        out: dict[str, int | float] = {}
        get = self.data.get
        for verb, past in (("load", "loaded"), ("store", "stored")):
            nbytes, seconds = get(f"{verb}_bytes", 0), get(f"{verb}_seconds", 0)
            out[f"{past} tokens"] = round(get(f"{verb}_tokens", 0))
            out[f"{past} GB"] = _short(nbytes / 1e9)
            out[f"{verb} GB/s"] = _short(nbytes / 1e9 / seconds) if seconds > 0 else 0
        out["blended tokens"] = round(get("blend_tokens", 0))
        out["repaired tokens"] = round(get("blend_computed_tokens", 0))
        out["failed tokens"] = round(get("load_failed_tokens", 0))
        out["asked tokens"] = round(get("asked_tokens", 0))
        for name, n in sorted(self.data.items()):
            family, _, label = name.partition(".")
            if label and family in FAMILIES:
                out[f"{family.replace('_', ' ')} {label}"] = round(n)
        return {name: n for name, n in out.items() if n}


class PromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # as above
    """`Stats` as Prometheus metrics `vllm:tierloom_*`, made of the classes that vLLM hands in."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[Any, Any],
        labelnames: Sequence[str],
        per_engine_labelvalues: Mapping[int, Sequence[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make, names = metric_types[Counter], list(labelnames)
        self._engines = {i: list(values) for i, values in per_engine_labelvalues.items()}
        plain = {
            name: make(name=f"vllm:tierloom_{name}", documentation=text, labelnames=names)
            for name, text in COUNTS.items()
        }
        # Made now, not with the first event: a counter that is missing is not a counter at zero.
        self._plain = {
            (i, name): counter.labels(*values)
            for i, values in self._engines.items()
            for name, counter in plain.items()
        }
        self._families = {
            family: make(
                name=f"vllm:tierloom_{name}", documentation=text, labelnames=[*names, label]
            )
            for family, (name, label, text) in FAMILIES.items()
        }
        self._histograms = {
            (i, name): histogram.labels(*values)
            for name, (text, bounds) in HISTOGRAMS.items()
            for histogram in [
                metric_types[Histogram](
                    name=f"vllm:tierloom_{name}", documentation=text, labelnames=names,
                    buckets=list(bounds),
                )
            ]
            for i, values in self._engines.items()
        }  # fmt: skip
        self._gauges = {
            name: metric_types[Gauge](
                name=f"vllm:tierloom_{name}", documentation=family.help,
                labelnames=[*names, *family.labels], multiprocess_mode="mostrecent",
            )
            for name, family in OF_DOORS.items()
            if family.kind == "gauge"
        }  # fmt: skip
        self._now: dict[int, dict[str, Mapping[str, float]]] = {i: {} for i in self._engines}
        """By engine and worker: what it reported last."""
        self._children: dict[tuple[int, str], Any] = {}
        for engine in self._engines:
            for cause in Lost:
                self._child(engine, f"lost.{cause.name.lower()}")

    def observe(self, transfer_stats_data: Mapping[str, Any], engine_idx: int = 0) -> None:
        """Add what one report brought. Never raises for what it does not know."""
        for name, n in transfer_stats_data.items():
            if isinstance(n, list):
                if (histogram := self._histograms.get((engine_idx, name))) is not None:
                    for value in filter(_is_number, n):
                        histogram.observe(value)
                continue
            if isinstance(n, Mapping):
                self._show(engine_idx, name, n)
                continue
            if not _is_number(n) or n <= 0:
                continue
            counter = self._plain.get((engine_idx, name)) or self._child(engine_idx, name)
            if counter is not None:
                counter.inc(n)

    def _show(self, engine: int, worker: str, values: Mapping[str, float]) -> None:
        """Set gauges to what all workers of an engine have together."""
        parts = self._now.get(engine)
        if parts is None or not worker.startswith(NOW):
            return
        parts[worker] = values
        for (name, labels), value in gauges_of_many(parts.values()).items():
            if name in self._gauges and _is_number(value):
                self._gauges[name].labels(*self._engines[engine], *labels).set(value)

    def _child(self, engine: int, name: str) -> Any:
        """The counter of a dotted name, made on its first use; None for a name that is unknown."""
        family, _, label = name.partition(".")
        if not label or family not in self._families or engine not in self._engines:
            return None
        key = (engine, name)
        if key not in self._children:
            values = [*self._engines[engine], label]
            self._children[key] = self._families[family].labels(*values)
        return self._children[key]


def _is_number(n: object) -> bool:
    return isinstance(n, (int, float)) and math.isfinite(n)


def _short(n: float) -> float:
    """Three significant digits."""
    return float(f"{n:.3g}")
