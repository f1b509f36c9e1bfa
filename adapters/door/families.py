"""What a process exports: metric families, and where in the figures of its parts their values are.

A process has one part or several: pipelines, workers of an engine. Their values become one, so that
the number of series does not grow with theirs, nor with objects and tenants. No client library is
imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]
Key = tuple[str, tuple[str, ...]]
"""A family's name, and the values of its labels."""


class Family(NamedTuple):
    """One metric."""

    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    of_many: Literal["sum", "min", "max"] = "sum"
    """What several parts' values become."""


_STAGE, _WIRE, _TIER, _WAY = ("graph", "stage"), ("graph", "wire"), ("tier",), ("tier", "direction")
FAMILIES = {
    "off": Family("gauge", "1 where nothing is kept any more, of each part."),
    "stage_batches": Family("counter", "Batches that a stage worked on.", _STAGE),
    "stage_chunks": Family("counter", "Chunks that a stage worked on.", _STAGE),
    "stage_seconds": Family("counter", "Seconds in a stage, busy or waiting.", _STAGE),
    "stage_broken": Family("counter", "Batches that a stage broke at.", _STAGE),
    "graph_requests": Family("gauge", "Requests under way.", ("graph",)),
    "graph_degraded": Family("gauge", "1 while a graph takes no requests.", ("graph",)),
    "wire_batches": Family("gauge", "Batches that wait for a segment.", _WIRE),
    "wire_dropped_chunks": Family("counter", "Chunks dropped as a wire was full.", _WIRE),
    "tier_hits": Family("counter", "Objects that a tier had.", _TIER),
    "tier_misses": Family("counter", "Objects that a tier was asked for and had not.", _TIER),
    "tier_puts": Family("counter", "Objects put into a tier.", _TIER),
    "tier_evictions": Family("counter", "Objects evicted to make room.", _TIER),
    "tier_refusals": Family("counter", "Objects that a tier did not take.", _TIER),
    "tier_corrupt": Family("counter", "Objects that were damaged.", _TIER),
    "tier_events": Family("counter", "What else happened at a tier.", ("tier", "event")),
    "tier_bytes": Family("counter", "Bytes put (in) and read (out).", _WAY),
    "tier_objects": Family("gauge", "Objects kept, as far as this process knows.", _TIER),
    "tier_used_bytes": Family("gauge", "Bytes kept, as far as this process knows.", _TIER),
    "tier_capacity_bytes": Family("gauge", "Most bytes kept; 0: no limit, or not known.", _TIER),
    "tier_up": Family("gauge", "1 while reads, or puts, work.", _WAY, "min"),
    "tier_down_since_seconds": Family(
        "gauge", "When reads, or puts, began to fail, since 1970; 0: they work.", _WAY, "max"
    ),
    "tier_latency_seconds": Family("gauge", "Learned: before the first byte.", _TIER, "max"),
    "tier_bandwidth_bytes": Family("gauge", "Learned: bytes per second.", _TIER, "min"),
    "tier_call_seconds": Family("histogram", "Calls that moved objects.", _WAY),
    "tier_call_bytes": Family("histogram", "Bytes of calls that moved objects.", _WAY),
    "object_age_seconds": Family("histogram", "Sampled: age at eviction.", _TIER),
    "object_idle_seconds": Family("histogram", "Sampled: not used before eviction.", _TIER),
    "object_reuse_seconds": Family("histogram", "Sampled: between two uses.", _TIER),
    "object_evictions": Family("counter", "Sampled: objects evicted.", _TIER),
    "object_regrets": Family("counter", "Sampled: evicted, and then put again.", _TIER),
    "arena_bytes": Family("gauge", "Memory by use: kept, or in flight.", ("use",)),
    "arena_total_bytes": Family("gauge", "All memory of the arena."),
    "arena_leases": Family("gauge", "Pieces of the arena that are in use."),
    "asked_tokens": Family("counter", "Prompt tokens of retrieves."),
    "loads": Family("counter", "Retrieves that ended, whole or in part."),
    "load_tokens": Family("counter", "Tokens whose KV was loaded instead of computed."),
    "load_bytes": Family("counter", "Bytes of KV placed."),
    "load_seconds": Family("counter", "Seconds from the call to the end of retrieves."),
    "load_duration_seconds": Family("histogram", "Retrieves, from the call to the end."),
    "load_size_bytes": Family("histogram", "Bytes of KV placed by one retrieve."),
    "stores": Family("counter", "Stores that ended."),
    "store_tokens": Family("counter", "Tokens that were kept when their store ended."),
    "store_bytes": Family("counter", "Bytes of KV newly kept."),
    "store_seconds": Family("counter", "Seconds from the call to the end of stores."),
    "store_duration_seconds": Family("histogram", "Stores, from the call to the end."),
    "store_size_bytes": Family("histogram", "Bytes of KV newly kept by one store."),
    "lost_chunks": Family("counter", "Chunks not delivered or not kept, by cause.", ("cause",)),
    "hit_tokens": Family("counter", "Tokens found, by the tier that had them.", _TIER),
    "clients": Family("gauge", "Connections of others that read, or put, here."),
    "given_objects": Family("counter", "Objects given to other engines."),
    "given_held_bytes": Family("gauge", "Bytes that are being sent to other engines."),
    "lent_bytes": Family("gauge", "Bytes that other engines have put here."),
    "unwritten_bytes": Family("gauge", "Bytes that are to be written to colder tiers."),
    "unwritten_objects": Family("counter", "Objects not written: a colder tier was too slow."),
    "handoff_tickets": Family("gauge", "Requests computed here for other engines."),
    "handoff_pinned_bytes": Family("gauge", "Bytes held for them."),
    "handoff_landing": Family("gauge", "Requests whose KV comes from other engines now."),
    "handoff_landed_objects": Family("counter", "Objects that came from other engines."),
    "handoff_bytes": Family("counter", "Bytes that came from other engines."),
    "handoff_given_up": Family("counter", "Requests of whose KV not all came."),
}  # fmt: skip
_COUNTED = {
    "hits": "tier_hits", "misses": "tier_misses", "puts": "tier_puts", "evicted": "tier_evictions",
    "refused": "tier_refusals", "corrupt": "tier_corrupt", "objects": "tier_objects",
    "nbytes": "tier_used_bytes", "capacity": "tier_capacity_bytes",
    "latency": "tier_latency_seconds", "bandwidth": "tier_bandwidth_bytes",
}  # fmt: skip
_OTHERS = {
    ("serve", "clients"): "clients", ("serve", "given"): "given_objects",
    ("serve", "held"): "given_held_bytes", ("serve", "lent"): "lent_bytes",
    ("store", "writing"): "unwritten_bytes", ("store", "dropped"): "unwritten_objects",
    ("handoff", "tickets"): "handoff_tickets", ("handoff", "pinned"): "handoff_pinned_bytes",
    ("handoff", "landing"): "handoff_landing", ("handoff", "landed"): "handoff_landed_objects",
    ("handoff", "bytes"): "handoff_bytes", ("handoff", "given_up"): "handoff_given_up",
}  # fmt: skip
_SHOWN = {
    "bytes_in", "bytes_out", "available", "reads_down_since", "writes_down_since", "last_error",
}  # fmt: skip
"""Figures of a tier that are shown in a way of their own."""


def samples(parts: Mapping[str, Mapping[str, Any]]) -> dict[Key, Any]:
    """The value of each series; of a histogram as `Histogram.read` gives it. `parts`: what
    `Pipeline.stats` gives, by name; one that holds an `error` instead counts for nothing."""
    found: dict[Key, Any] = {}
    for part in parts.values():
        if "error" in part:
            continue
        for name, labels, value in _of_part(part):
            before, key = found.get((name, labels)), (name, labels)
            found[key] = value if before is None else _joined(FAMILIES[name], before, value)
    return found


def gauges(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Those of `samples` that are gauges, by name and labels with `|` between, for a wire."""
    found = samples(parts).items()
    return {"|".join((n, *labels)): v for (n, labels), v in found if FAMILIES[n].kind == "gauge"}


def gauges_of_many(told: Iterable[Mapping[str, float]]) -> dict[Key, float]:
    """What several processes said by `gauges`, as one; names that are not known are left out."""
    found: dict[Key, float] = {}
    for values in told:
        for written, value in values.items():
            name, *labels = written.split("|")
            family, key = FAMILIES.get(name), (name, tuple(labels))
            if family is not None and len(labels) == len(family.labels):
                found[key] = _joined(family, found[key], value) if key in found else value
    return found


def _joined(family: Family, one: Any, other: Any) -> Any:
    if family.kind != "histogram":
        how: dict[str, Callable[[Any, Any], Any]] = {"min": min, "max": max}
        return how[family.of_many](one, other) if family.of_many in how else one + other
    counts = [a + b for a, b in zip(one["counts"], other["counts"], strict=True)]
    return {"bounds": one["bounds"], "counts": counts, "sum": one["sum"] + other["sum"]}


def _of_part(part: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    yield "off", (), int(part["off"] is not None)
    for graph, stages in part["stages"].items():
        for stage, meter in stages.items():
            for name, n in meter.items():
                yield f"stage_{name}", (graph, stage), n
    for graph, said in part["graphs"].items():
        yield "graph_requests", (graph,), said["open"]
        yield "graph_degraded", (graph,), int(said["degraded"])
        for wire, state in said["wires"].items():
            yield "wire_batches", (graph, wire), state["depth"]
            yield "wire_dropped_chunks", (graph, wire), state["dropped"]
    for tier, figures in part["tiers"].items():
        yield from _of_tier(tier, figures)
    arena = part["arena"]
    yield "arena_bytes", ("kept",), arena["used"] - arena["flight"]
    yield "arena_bytes", ("flight",), arena["flight"]
    yield "arena_total_bytes", (), arena["total"]
    yield "arena_leases", (), arena["leases"]
    for (group, figure), name in _OTHERS.items():
        if figure in part.get(group, {}):
            yield name, (), part[group][figure]
    if "measured" in part:
        yield from _measured(part["measured"])


def _of_tier(
    tier: str, figures: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, ...], Any]]:  # fmt: skip
    for figure, value in figures.items():
        if figure in _COUNTED:
            yield _COUNTED[figure], (tier,), value
        elif figure not in _SHOWN:  # what only some tiers count, and causes: few by their code
            yield "tier_events", (tier, figure), value
    yield "tier_bytes", (tier, "in"), figures["bytes_in"]
    yield "tier_bytes", (tier, "out"), figures["bytes_out"]
    for direction, since in (("reads", "reads_down_since"), ("puts", "writes_down_since")):
        yield "tier_up", (tier, direction), int(not figures[since])
        yield "tier_down_since_seconds", (tier, direction), figures[since]


def _measured(measured: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    yield "asked_tokens", (), measured["requests"]["retrieve"]["asked"]
    for graph, verb in (("retrieve", "load"), ("store", "store")):
        tally = measured["requests"][graph]
        yield f"{verb}s", (), tally["requests"]
        yield f"{verb}_tokens", (), tally["tokens"]
        yield f"{verb}_bytes", (), tally["bytes"]
        yield f"{verb}_seconds", (), tally["seconds"]["sum"]
        yield f"{verb}_duration_seconds", (), tally["seconds"]
        yield f"{verb}_size_bytes", (), tally["sizes"]
    for cause, n in measured["lost"].items():
        yield "lost_chunks", (cause,), n
    for tier, n in measured["hit_tokens"].items():
        yield "hit_tokens", (tier,), n
    for tier, calls in measured["calls"].items():
        for way in ("reads", "puts"):
            yield "tier_call_seconds", (tier, way), calls[f"{way}_seconds"]
            yield "tier_call_bytes", (tier, way), calls[f"{way}_bytes"]
    for tier, lives in measured["lives"].items():
        yield "object_age_seconds", (tier,), lives["age"]
        yield "object_idle_seconds", (tier,), lives["idle"]
        yield "object_reuse_seconds", (tier,), lives["gap"]
        yield "object_evictions", (tier,), lives["evicted"]
        yield "object_regrets", (tier,), lives["regretted"]
