"""Lowering: a pure function from graphs to segments."""

from __future__ import annotations

from typing import Any

from conftest import config

from tierloom.pipeline.check import load
from tierloom.pipeline.lower import lower
from tierloom.stages.base import Lane


def segments(graph: str, **changes: Any) -> list[tuple[str, Lane, int | None, str, bool]]:
    made = lower(load(config(**changes)).graphs[graph])
    return [(s.id, s.lane, s.source, s.when_full, s.head) for s in made]


def test_a_graph_is_cut_where_the_lane_changes_and_behind_the_plan() -> None:
    assert segments("retrieve") == [
        ("keys", Lane.POOL, None, "block", True),
        ("plan", Lane.LOOP, 0, "block", True),
        ("fetch", Lane.LOOP, 1, "block", False),
        ("grow+place", Lane.POOL, 2, "block", False),
    ]


def test_a_fork_is_a_cut_and_its_later_branches_drop() -> None:
    two = {
        "tiers__cold": {"use": "memory", "capacity": "1 MiB"},
        "graphs__store__stages__cold": {"use": "put", "tier": "cold"},
    }
    assert segments("store", **two)[2:] == [
        ("pack", Lane.POOL, 1, "block", False),
        ("hot", Lane.LOOP, 2, "block", False),
        ("cold", Lane.LOOP, 2, "drop", False),
    ]
    two["graphs__store__stages__cold"]["when_full"] = "spill"
    assert segments("store", **two)[-1][3] == "spill"


def test_a_wire_with_options_is_a_cut() -> None:
    made = segments("retrieve", graphs__retrieve__stages__place={"use": "scatter", "width": 2})
    assert [s[0] for s in made[-2:]] == ["grow", "place"]
    whole = lower(
        load(config(graphs__retrieve__stages__place={"use": "scatter", "depth": 3})).graphs[
            "retrieve"
        ]
    )
    assert (whole[-1].depth, whole[-1].width) == (3, 4)


def test_readers_and_sources_agree() -> None:
    made = lower(load("tiered").graphs["store"])
    for i, segment in enumerate(made):
        for reader in segment.readers:
            assert made[reader].source == i
        if segment.source is not None:
            assert i in made[segment.source].readers
