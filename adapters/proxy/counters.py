"""What a proxy counts, as Prometheus reads it. Names begin with `tierloom_proxy_`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tierloom.adapters.proxy.fleet import EngineSeat, Fleet

_BOUNDS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)
_HELP = {
    "requests_total": "Requests, by path, way (after, together, told, alone, passed) and status.",
    "retries_total": "Requests that went to another engine, by role of the one that failed.",
    "handoffs_total": "Prefills, by what came of them (params, none, refused, failed), late notes.",
    "broken_streams_total": "Answers that an engine left in their middle.",
    "gone_total": "Requests whose client left before their end.",
    "prefill_seconds": "From a request to its prefiller's answer.",
    "first_byte_seconds": "From a request to the first byte of its answer.",
    "request_seconds": "From a request to the end of its answer.",
}


class ProxyCounters:
    """Counters and histograms of one proxy."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, int]] = {}
        self._times: dict[str, list[float]] = {}

    def count(self, name: str, **labels: str) -> None:
        """One more."""
        key = ",".join(f'{k}="{v}"' for k, v in labels.items())
        counts = self._counts.setdefault(name, {})
        counts[key] = counts.get(key, 0) + 1

    def took(self, name: str, seconds: float) -> None:
        """One more that took so long."""
        row = self._times.setdefault(name, [0.0] * (len(_BOUNDS) + 2))
        row[0] += seconds
        row[1] += 1
        for i, bound in enumerate(_BOUNDS):
            if seconds <= bound:
                row[i + 2] += 1

    def text(self, fleet: Fleet) -> str:
        """All of it, and what the engines are doing."""
        return "\n".join((*self._lines(), *_engine_lines(fleet), ""))

    def _lines(self) -> Iterator[str]:
        for name, counts in self._counts.items():
            yield from _head(name, "counter", _HELP[name])
            for key, n in counts.items():
                yield f"tierloom_proxy_{name}{{{key}}} {n}" if key else f"tierloom_proxy_{name} {n}"
        for name, (total, times, *below) in self._times.items():
            yield from _head(name, "histogram", _HELP[name])
            for limit, under in zip((*_BOUNDS, "+Inf"), (*below, times), strict=True):
                yield f'tierloom_proxy_{name}_bucket{{le="{limit}"}} {under:.0f}'
            yield f"tierloom_proxy_{name}_sum {total:.6f}"
            yield f"tierloom_proxy_{name}_count {times:.0f}"


def _engine_lines(fleet: Fleet) -> Iterator[str]:
    gauges: dict[str, tuple[str, Callable[[EngineSeat], int]]] = {
        "engine_up": ("1 if it is asked, 0 if it is left alone.", lambda s: int(s.is_up)),
        "engine_requests": ("Requests that it works on.", lambda s: s.running),
        "engine_queued_tokens": ("Tokens of prompts to compute.", lambda s: s.queued),
        "engine_draining": ("1 if it gets no new requests.", lambda s: int(s.draining)),
    }
    for name, (help_, value) in gauges.items():
        yield from _head(name, "gauge", help_)
        for seat in fleet.seats:
            yield f'tierloom_proxy_{name}{{role="{seat.role}",url="{seat.url}"}} {value(seat)}'
    yield from _head("bytes_per_token", "gauge", "By which lengths of prompts are estimated.")
    yield f"tierloom_proxy_bytes_per_token {fleet.bytes_per_token:.4f}"


def _head(name: str, kind: str, help_: str) -> tuple[str, str]:
    return f"# HELP tierloom_proxy_{name} {help_}", f"# TYPE tierloom_proxy_{name} {kind}"
