"""What a run of a workload came to: by round, and beside an earlier run."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tierloom.adapters.workload.openai_stream import Sample
from tierloom.stages.display.amounts import time_text

_SERIES = re.compile(r"^([a-zA-Z_:][\w:]*?)(?:_total)?(?:\{[^}]*\})? ([-+0-9.eE]+)", re.MULTILINE)
HITS = {
    "the engine's own cache": ("vllm:prefix_cache_hits", "vllm:prefix_cache_queries"),
    "tierloom": ("vllm:external_prefix_cache_hits", "vllm:external_prefix_cache_queries"),
    "SGLang's caches": ("sglang:cached_tokens", "sglang:prompt_tokens"),
}
"""Counters of tokens found, and of those asked for, that engines have in /metrics."""
COLUMNS = (
    "prompt_tokens", "generation_tokens", "ttft", "generation_time", "user_id", "question_id",
    "launch_time", "finish_time", "arm", "cached_tokens", "late", "warm", "error",
)  # fmt: skip
"""Of the CSV file; the first eight are those of LMCache's script."""


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """p50, p90 and p99, each a value that occurred (nearest rank); empty without values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    rank = {f"p{q}": max(0, math.ceil(q / 100 * len(ordered)) - 1) for q in (50, 90, 99)}
    return {name: ordered[at] for name, at in rank.items()}


def hit_shares(before: str, after: str) -> dict[str, float]:
    """Of two readings of /metrics: tokens found of those asked for in between, by cache."""
    shares = {}
    old, new = _sums(before), _sums(after)
    for cache, (found, asked) in HITS.items():
        if asked in new and (wanted := new[asked] - old.get(asked, 0.0)) > 0:
            shares[cache] = (new.get(found, 0.0) - old.get(found, 0.0)) / wanted
    return shares


def figures_of(
    samples: Sequence[Sample], seconds: float, frames: Mapping[bool, float]
) -> dict[str, Any]:
    """All figures of a run. `seconds`: that it took. `frames`: tokens of a prompt that are no text
    of ours, with a system message and without. Times are in seconds."""
    counted = [s for s in samples if s.warm]
    good = [s for s in counted if not s.error]
    span = max((s.ended for s in counted), default=0) - min((s.sent for s in counted), default=0)
    span = max(span, 1e-9)
    aimed = [s for s in good if s.wanted and s.counted]
    lengths = {}
    if aimed:
        wanted = sum(s.wanted for s in aimed)
        got = sum(s.prompt_tokens - frames[s.messages[0]["role"] == "system"] for s in aimed)
        lengths = {"wanted_tokens": wanted, "got_tokens": got, "off": got / wanted - 1}
    arms = sorted({s.arm for s in counted})
    rounds = [
        {"arm": arm, "round": r} | _summary([s for s in counted if (s.arm, s.round) == (arm, r)])
        for arm in arms
        for r in sorted({s.round for s in counted if s.arm == arm})
    ]
    later = {arm: quantiles(s.ttft for s in good if s.arm == arm and s.round > 1) for arm in arms}
    return {
        "requests": len(counted), "warm_up_requests": len(samples) - len(counted),
        "errors": dict(Counter(s.error for s in counted if s.error)), "seconds": seconds,
        "requests_per_s": len(good) / span,
        "prompt_tokens_per_s": sum(s.prompt_tokens for s in good) / span,
        "answer_tokens_per_s": sum(s.answer_tokens for s in good) / span,
        "late_s": quantiles(s.late for s in counted),
        "counted_by": "the server" if all(s.counted for s in good) else "pieces of the stream",
        "lengths": lengths, "rounds": rounds,
        "all": [{"arm": arm} | _summary([s for s in counted if s.arm == arm]) for arm in arms],
        "later_rounds_ttft_s": later,
        "with_of_without": _ratio(later, "with", "without"),
    }  # fmt: skip


def _ratio(later: Mapping[str, Mapping[str, float]], one: str, other: str) -> float | None:
    """Of the median TTFT of rounds from the second on."""
    if not later.get(one) or not later.get(other):
        return None
    return later[one]["p50"] / max(later[other]["p50"], 1e-9)


def _summary(samples: Sequence[Sample]) -> dict[str, Any]:
    good = [s for s in samples if not s.error]
    said = [s for s in good if s.cached_tokens is not None]
    prompt = sum(s.prompt_tokens for s in said)
    return {
        "requests": len(samples), "errors": len(samples) - len(good),
        "prompt_tokens": sum(s.prompt_tokens for s in good) / max(1, len(good)),
        "answer_tokens": sum(s.answer_tokens for s in good) / max(1, len(good)),
        "cached_share": sum(s.cached_tokens or 0 for s in said) / prompt if prompt else None,
        "ttft_s": quantiles(s.ttft for s in good),
        "between_tokens_s": quantiles(gap for s in good for gap in s.gaps),
        "whole_s": quantiles(s.ended - s.sent for s in good),
    }  # fmt: skip


def write_csv(path: Path, samples: Sequence[Sample], began: float) -> None:
    """A row for each request; times in seconds, from the start of the run on."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for s in samples:
            first = s.first or s.ended
            rows.writerow((
                s.prompt_tokens, s.answer_tokens, f"{s.ttft:.6f}", f"{s.ended - first:.6f}",
                s.session, s.round, f"{s.sent - began:.6f}", f"{s.ended - began:.6f}", s.arm,
                "" if s.cached_tokens is None else s.cached_tokens, f"{s.late:.6f}", int(s.warm),
                s.error,
            ))  # fmt: skip


def rounds_table(figures: Mapping[str, Any], title: str) -> Table:
    """By round; in the last rows all of them."""
    rows, arms = (*figures["rounds"], *figures["all"]), len(figures["all"]) > 1
    failed = any(row["errors"] for row in rows)
    table = Table(title=title, caption="prompt, answer: tokens; times: p50 / p90 / p99")
    table.add_column("round")
    for name in ("asked", *["failed"] * failed, "prompt", "answer", "cached", "first token",
                 "between tokens"):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        name = str(row.get("round", "all")) + (f", {row['arm']}" if arms else "")
        cached = row["cached_share"]
        table.add_row(
            name, str(row["requests"]), *[str(row["errors"] or "")] * failed,
            f"{row['prompt_tokens']:.0f}", f"{row['answer_tokens']:.0f}",
            "" if cached is None else f"{cached:.0%}",
            _times(row["ttft_s"]), _times(row["between_tokens_s"]),
            end_section=bool(figures["rounds"]) and row is figures["rounds"][-1],
        )  # fmt: skip
    return table


def compared_table(now: Mapping[str, Any], then: Mapping[str, Any], name: str) -> Table:
    """This run beside an earlier one of the same shape: medians, and their ratio."""
    table = Table(title=f"beside {name}")
    for column in ("", "then", "now", "now / then"):
        table.add_column(column, justify="right" if column else "left")
    arms = len(now["all"]) > 1
    before = {(r["arm"], r["round"]): r for r in then["rounds"]}
    for row in now["rounds"]:
        old = before.get((row["arm"], row["round"]))
        if old and old["ttft_s"] and row["ttft_s"]:
            a, b = old["ttft_s"]["p50"], row["ttft_s"]["p50"]
            label = f"first token, round {row['round']}" + f" ({row['arm']})" * arms
            table.add_row(label, time_text(a), time_text(b), f"{b / max(a, 1e-9):.2f}")
    for key, label in (("requests_per_s", "requests/s"), ("answer_tokens_per_s", "answer tokens/s"),
                       ("prompt_tokens_per_s", "prompt tokens/s")):  # fmt: skip
        a, b = then[key], now[key]
        table.add_row(label, f"{a:.2f}", f"{b:.2f}", f"{b / max(a, 1e-9):.2f}")
    return table


def _times(found: Mapping[str, float]) -> str:
    """In the unit of the largest."""
    if not found:
        return ""
    unit, name = (1.0, "s") if max(found.values()) >= 1 else (1e-3, "ms")
    return " / ".join(f"{value / unit:.3g}" for value in found.values()) + f" {name}"


def _sums(text: str) -> Counter[str]:
    """Of each family over all of its series."""
    sums: Counter[str] = Counter()
    for name, value in _SERIES.findall(text):
        sums[name] += float(value)  # type: ignore[assignment]
    return sums
