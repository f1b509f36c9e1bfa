"""Lowering: a pure function from graphs to segments."""

from __future__ import annotations

from typing import Any

from conftest import config

from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.segments import lower


def segments(graph: str, **changes: Any) -> list[tuple[str, int | None, str, bool]]:
    made = lower(load_config(config(**changes)).graphs[graph])
    return [(s.id, s.source, s.when_full, s.head) for s in made]


def test_a_graph_is_cut_behind_its_plan() -> None:
    assert segments("retrieve") == [
        ("keys+plan", None, "block", True),
        ("fetch+grow+place", 0, "block", False),
    ]


def test_a_fork_is_a_cut_and_its_later_branches_drop() -> None:
    two = {
        "tiers__cold": {"use": "memory", "capacity": "1 MiB"},
        "graphs__store__stages__cold": {"use": "put", "tier": "cold"},
    }
    assert segments("store", **two)[1:] == [
        ("pack", 0, "block", False),
        ("hot", 1, "block", False),
        ("cold", 1, "drop", False),
    ]
    two["graphs__store__stages__cold"]["when_full"] = "spill"
    assert segments("store", **two)[-1][2] == "spill"


def test_a_wire_with_options_is_a_cut() -> None:
    place = {"use": "scatter", "width": 2}
    made = segments("retrieve", graphs__retrieve__stages__place=place)
    assert [s[0] for s in made[-2:]] == ["fetch+grow", "place"]
    place = {"use": "scatter", "depth": 3}
    whole = lower(load_config(config(graphs__retrieve__stages__place=place)).graphs["retrieve"])
    assert (whole[-1].depth, whole[-1].width) == (3, 8)


def test_readers_and_sources_agree() -> None:
    made = lower(load_config("tiered").graphs["store"])
    for i, segment in enumerate(made):
        for reader in segment.readers:
            assert made[reader].source == i
        if segment.source is not None:
            assert i in made[segment.source].readers
