"""Figures of one arm over documents, with intervals: what `tierloom quality` reports.

All figures compare an arm (the model on KV that came back from a codec) with full-precision full
recompute, position by position of a suffix that is given (teacher-forced):

- KL: mean over positions of `sum_v p(v) log(p(v) / q(v))`, p the reference, q the arm; nats.
- KL p95: its 95th percentile over all positions of all documents.
- dNLL: what the suffix's tokens cost more, nats per token; exp(dNLL) is the ratio of perplexities.
- top-1: share of positions whose most likely token is the same.
- needles: the value's tokens of `key = value` facts; mean NLL, and the share of needles all of
  whose tokens are the most likely ones (which is when greedy decoding would say them).

A mean is over documents, each of which counts once. An interval is 95 %, from 2,000 bootstrap
samples of documents; ratios of two arms are paired by document.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SAMPLES = 2000
SEED = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One arm on one document."""

    document: str
    elements: int
    """K and V elements that were treated."""
    stored: int
    """Bytes that were stored for them, everything counted."""
    payload: int
    """Those of them that are frames: no header, no padding to pages."""
    exact: bool
    """What came back is, bit by bit, what was stored."""
    kl: Array
    """Nats, per suffix position, over all spans."""
    dnll: float
    top1: float
    spans: tuple[tuple[int, float], ...]
    """(context, mean KL) of each span."""
    needle_nll: Array = field(default_factory=lambda: np.zeros(0))
    """Per value, mean over its tokens."""
    needle_hit: Array = field(default_factory=lambda: np.zeros(0))
    """Per value, 1 where every token of it is the most likely one."""


@dataclass(frozen=True, slots=True)
class Score:
    """One arm on all documents."""

    arm: str
    outcomes: tuple[Outcome, ...]

    @property
    def bits(self) -> float:
        """Bits per element of all that was stored: headers, tables, scales and padding counted."""
        return 8 * self._sum("stored") / self._sum("elements")

    @property
    def kls(self) -> Array:
        """Mean KL of each document."""
        return np.array([o.kl.mean() for o in self.outcomes])

    @property
    def kl(self) -> float:
        return float(self.kls.mean())

    @property
    def needle_nll(self) -> float | None:
        return _mean_of([o.needle_nll for o in self.outcomes])

    @property
    def recall(self) -> float | None:
        return _mean_of([o.needle_hit for o in self.outcomes])

    def report(self) -> dict[str, Any]:
        """As JSON. Bits per element, nats, shares."""
        positions = np.concatenate([o.kl for o in self.outcomes])
        contexts = sorted({n for o in self.outcomes for n, _ in o.spans})
        return {
            "bits_per_element": round(self.bits, 4),
            "payload_bits_per_element": _digits(8 * self._sum("payload") / self._sum("elements")),
            "kl": _digits(self.kl),
            "kl_interval": [_digits(x) for x in interval(self.kls)],
            "kl_p95": _digits(float(np.quantile(positions, 0.95))),
            "kl_by_context": {str(n): _digits(self._kl_at(n)) for n in contexts},
            "dnll": _digits(float(np.mean([o.dnll for o in self.outcomes]))),
            "top1": _digits(float(np.mean([o.top1 for o in self.outcomes]))),
            "needle_nll": _digits(self.needle_nll),
            "needle_recall": _digits(self.recall),
            "bit_exact": all(o.exact for o in self.outcomes),
            "documents": len(self.outcomes),
            "per_document": {
                o.document: {
                    "bits_per_element": _digits(8 * o.stored / o.elements),
                    "kl": _digits(float(o.kl.mean())),
                    "dnll": _digits(o.dnll),
                    "top1": _digits(o.top1),
                }
                for o in self.outcomes
            },
        }

    def _sum(self, name: str) -> int:
        return sum(getattr(o, name) for o in self.outcomes)

    def _kl_at(self, context: int) -> float:
        return float(np.mean([kl for o in self.outcomes for n, kl in o.spans if n == context]))


def interval(values: Array) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values`, one per document."""
    means = values[_samples(len(values))].mean(axis=1)
    return _ends(means)


def ratio(values: Array, others: Array) -> tuple[float, tuple[float, float]]:
    """mean(values) / mean(others), and its 95 % bootstrap interval, paired by document."""
    picks = _samples(len(values))
    samples = values[picks].mean(axis=1) / others[picks].mean(axis=1)
    return float(values.mean() / others.mean()), _ends(samples)


def _samples(n: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(SEED).integers(0, n, (SAMPLES, n))


def _ends(samples: Array) -> tuple[float, float]:
    low, high = np.quantile(samples, (0.025, 0.975))
    return float(low), float(high)


def _mean_of(parts: list[Array]) -> float | None:
    whole = np.concatenate(parts)
    return float(whole.mean()) if whole.size else None


def _digits(value: float | None) -> float | None:
    """Five digits are more than the intervals carry."""
    return None if value is None else float(f"{value:.5g}")
